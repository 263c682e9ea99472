// What goes wrong around the page: it says so, loses nothing, and goes on without a reload.
import { expect, test, type APIRequestContext, type Page } from '@playwright/test'
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

const IMAGE = 'public/examples/brick-1.jpg'
const TITLE = 'Drawings with made-up words'
const answer = (page: Page) => page.getByTestId('answer')
const heading = (page: Page) => page.getByRole('heading', { level: 1 })

test('a stream that ends early is an error and no answer, and can be asked again', async ({ page }) => {
  const chunk = JSON.stringify({ choices: [{ text: ' half', index: 0, logprobs: null, finish_reason: null }] })
  await page.route('/v1/completions', (route) =>
    route.fulfill({ contentType: 'text/event-stream', body: `data: ${chunk}\n\n` }),
  )
  await page.goto('/')
  await page.getByRole('button', { name: TITLE }).click()
  await expect(page.getByText('The connection broke before the answer was complete.')).toBeVisible()
  await page.unroute('/v1/completions')
  await page.getByRole('button', { name: 'Ask again' }).click()
  await expect(answer(page)).not.toBeEmpty()
  await expect(answer(page)).not.toHaveText('half')
})

test('a refusal says when to try again', async ({ page }) => {
  const error = { message: 'too many requests', type: 'rate_limit', param: null, code: 'rate_limited' }
  await page.route('/v1/completions', (route) =>
    route.fulfill({ status: 429, headers: { 'Retry-After': '7' }, json: { error } }),
  )
  await page.goto('/')
  await page.getByRole('button', { name: TITLE }).click()
  await expect(page.getByText('too many requests (try again in 7 s)')).toBeVisible()
})

test('shots are added over plain http too, and refused files with one name are both listed', async ({ page }) => {
  await page.addInitScript('delete Crypto.prototype.randomUUID')
  await page.goto('/')
  const bad = { name: 'notes.png', mimeType: 'image/png', buffer: Buffer.from('no image') }
  const good = { name: 'brick.jpg', mimeType: 'image/jpeg', buffer: readFileSync(IMAGE) }
  await page.getByTestId('files').first().setInputFiles([bad, bad, good])
  await expect(page.getByText(/^notes\.png: /)).toHaveCount(2)
  await expect(page.getByRole('textbox', { name: 'Text of shot 1' })).toBeVisible()
})

test('uploads that a lost connection has ended are in progress no more', async ({ page }) => {
  await page.goto('/#/sets')
  const pictures = Array.from({ length: 8 }, (_, at) => ({
    ...{ name: `${at}.jpg`, mimeType: 'image/jpeg' },
    buffer: Buffer.concat([readFileSync(IMAGE), Buffer.from(`${at}`)]),
  }))
  await page.getByTestId('files').setInputFiles(pictures)
  await page.route('/v1/images', (route) => route.abort())
  await page.getByRole('button', { name: 'Create set' }).click()
  await expect(page.getByRole('alert')).toContainText('The server cannot be reached.')
  await expect(page.getByRole('progressbar')).toHaveCount(0)
})

test('more pictures than a set may have are refused before any is uploaded', async ({ page }) => {
  await page.route('/v1/models', async (route) => {
    const response = await route.fetch()
    const models = await response.json()
    models.data[0].max_set_examples = 2
    await route.fulfill({ response, json: models })
  })
  let numUploads = 0
  page.on('request', (sent) => (numUploads += Number(sent.url().endsWith('/v1/images'))))
  const picture = (name: string) => ({ name, mimeType: 'image/jpeg', buffer: readFileSync(IMAGE) })
  const notes = { name: 'notes.txt', mimeType: 'text/plain', buffer: Buffer.from('no image') }
  const files = page.getByTestId('files')

  await page.goto('/#/sets')
  await expect(page.getByText('flamboyance-lite')).toBeVisible()
  await files.setInputFiles([picture('1.jpg'), picture('2.jpg'), picture('3.jpg')])
  await page.getByLabel('Name').fill('full')
  await page.getByRole('button', { name: 'Create set' }).click()
  await expect(page.getByRole('alert')).toHaveText('These are 3 pictures, and a set may have 2 examples.')
  expect(numUploads).toBe(0)

  await page.getByRole('button', { name: 'Cancel' }).click()
  await files.setInputFiles([picture('1.jpg'), notes])
  await page.getByLabel('Name').fill('full')
  await page.getByRole('button', { name: 'Create set' }).click()
  await page.getByRole('link', { name: 'Open full' }).click()
  const adding = page.getByRole('region', { name: 'Add examples' })
  await adding.getByTestId('files').setInputFiles([notes, picture('2.jpg'), picture('3.jpg')])
  await expect(page.getByRole('alert')).toHaveText('There was room for 1 of 2 pictures.')
  await expect(page.getByRole('article')).toHaveCount(2)
})

test('a picture that left the server is known again after an upload', async ({ page }) => {
  await page.goto('/')
  await page.getByRole('button', { name: TITLE }).click()
  await expect(answer(page)).not.toBeEmpty()
  await expect(page.getByRole('button', { name: /^Ask with 0 to/ })).toBeEnabled()
  await page.waitForTimeout(500) // the workspace is kept after a pause
  await page.route(/\/v1\/images\/[^/]+$/, (route) => route.fulfill({ status: 404, json: { error: { message: '' } } }))
  await page.reload()
  await expect(page.getByText('is no longer on the server. Remove it.')).toBeVisible()
  await page.getByRole('button', { name: TITLE }).click()
  await expect(answer(page)).not.toBeEmpty()
  await expect(page.getByText('No longer on the server')).toHaveCount(0)
})

test('the skip link stays in its view, and an address that names nothing shows the first view', async ({ page }) => {
  await page.goto('/#/server')
  await expect(heading(page)).toHaveText('Server')
  await page.getByRole('link', { name: 'Skip to content' }).focus()
  await page.keyboard.press('Enter')
  await expect(page.getByRole('main')).toBeFocused()
  await expect(heading(page)).toHaveText('Server')
  for (const address of ['/#/constructor', '/#/try/%', '/#/%E0%A4%A']) {
    await page.goto('about:blank')
    await page.goto(address)
    await expect(heading(page)).toHaveText('Try')
  }
})

test('what the server did not answer is asked again by a button', async ({ page, request }) => {
  const name = 'asked-again'
  const image = await (await request.post('/v1/images', { data: readFileSync(IMAGE) })).json()
  const media = [{ type: 'image_id', image_id: image.id }]
  await request.post('/v1/support_sets', { data: { name, examples: [{ label: 'brick', media }] } })
  const again = page.getByRole('button', { name: 'Try again' })

  await page.route(`/v1/support_sets/${name}`, (route) => route.abort())
  await page.goto(`/#/sets/${name}/use`)
  await expect(page.getByText('The server cannot be reached.')).toBeVisible()
  // by keyboard: the focus is on the button again when it has failed again, and stays in the view when it has not
  await again.press('Enter')
  await expect(again).toBeFocused()
  await page.unroute(`/v1/support_sets/${name}`)
  await again.press('Enter')
  await page.getByRole('link', { name: 'Examples' }).waitFor()
  await page.keyboard.press('Tab')
  await expect(page.getByRole('button', { name: 'Warm' })).toBeFocused()
  await page.route('/v1/classify', (route) => route.abort())
  await page.getByTestId('files').setInputFiles(IMAGE)
  await expect(page.getByText('The server cannot be reached.')).toBeVisible()
  await page.unroute('/v1/classify')
  await again.click()
  await expect(page.getByTestId('label')).toHaveText('brick')
  await expect(again).toBeHidden()
  await request.delete(`/v1/support_sets/${name}`)
})

test('of two pictures that are dropped one after the other, the second is classified', async ({ page, request }) => {
  const name = 'dropped-twice'
  const id = (await (await request.post('/v1/images', { data: readFileSync(IMAGE) })).json()).id
  const examples = [{ label: 'brick', media: [{ type: 'image_id', image_id: id }] }]
  await request.post('/v1/support_sets', { data: { name, examples } })
  await page.goto(`/#/sets/${name}/use`)
  let isFirst = true
  await page.route('/v1/images', async (route) => {
    if (isFirst) {
      isFirst = false
      await new Promise((resolve) => setTimeout(resolve, 2000))
    }
    await route.continue()
  })
  const slow = page.waitForRequest('/v1/images')
  await page.getByTestId('files').setInputFiles('public/examples/grass-1.jpg')
  const answered = (await slow).response()
  await page.getByTestId('files').setInputFiles(IMAGE)
  await expect(page.getByRole('img', { name: 'The query brick-1.jpg' })).toBeVisible()
  await answered
  await expect(page.getByText('Uploading')).toHaveCount(0)
  await expect(page.getByRole('img', { name: 'The query brick-1.jpg' })).toBeVisible()
  await request.delete(`/v1/support_sets/${name}`)
})

test('an edit survives that another one has changed the set', async ({ page, request }) => {
  const name = 'edited-twice'
  const image = await (await request.post('/v1/images', { data: readFileSync(IMAGE) })).json()
  const example = (id: string, label: string) => ({ id, label, media: [{ type: 'image_id', image_id: image.id }] })
  await request.post('/v1/support_sets', { data: { name, examples: [example('one', 'brick')] } })
  await page.goto(`/#/sets/${name}`)
  await page.getByRole('button', { name: 'Edit brick one' }).click()
  await page.getByRole('combobox', { name: 'Label', exact: true }).fill('wall')
  await request.post(`/v1/support_sets/${name}/examples`, { data: { examples: [example('two', 'grass')] } })

  await page.getByRole('button', { name: 'Save as version 2' }).click()
  await expect(page.getByText('The set was changed elsewhere.')).toBeVisible()
  await page.getByRole('button', { name: 'Save as version 3' }).click()
  await expect(page.getByRole('button', { name: 'Edit wall one' })).toBeVisible()
  await expect(page.getByRole('button', { name: 'Edit grass two' })).toBeVisible()
  await request.delete(`/v1/support_sets/${name}`)
})

test('an edit keeps what another one has changed, and does not bring back a removed example', async ({
  page,
  request,
}) => {
  const name = 'edited-by-two'
  const image = await (await request.post('/v1/images', { data: readFileSync(IMAGE) })).json()
  const example = (label: string, text: string) => ({
    ...{ id: 'one', label, text },
    media: [{ type: 'image_id', image_id: image.id }],
  })
  await request.post('/v1/support_sets', { data: { name, examples: [example('brick', 'red'), { text: 'two' }] } })
  const address = `/v1/support_sets/${name}/examples`
  await page.goto(`/#/sets/${name}`)
  await page.getByRole('button', { name: 'Edit brick one' }).click()
  await page.getByRole('combobox', { name: 'Label', exact: true }).fill('wall')
  await request.post(address, { data: { examples: [example('brick', 'old')] } })
  await page.getByRole('button', { name: 'Save as version 2' }).click()
  await page.getByRole('button', { name: 'Save as version 3' }).click()
  await page.getByRole('button', { name: 'Edit wall one' }).click()
  await expect(page.getByLabel('Text that the model learns to write')).toHaveValue('old')

  await page.getByRole('combobox', { name: 'Label', exact: true }).fill('house')
  await request.delete(`${address}?id=one`)
  await page.getByRole('button', { name: 'Save as version 4' }).click()
  await page.getByRole('button', { name: 'Save as version 5' }).click()
  await expect(page.getByText('The example was removed elsewhere.')).toBeVisible()
  await request.delete(`/v1/support_sets/${name}`)
})

test('a file that was changed after it was chosen is named, and the others go on', async ({ page, request }) => {
  const folder = mkdtempSync(join(tmpdir(), 'playground-'))
  const root = join(folder, 'changed')
  for (const file of ['brick/1.jpg', 'brick/2.jpg', 'grass/1.jpg']) cpSync(IMAGE, join(root, file), { recursive: true })
  await page.goto('/#/sets')
  await page.getByTestId('folder').setInputFiles(root)
  await expect(page.getByRole('button', { name: 'Create set' })).toBeVisible()
  rmSync(join(root, 'brick/2.jpg'))
  await page.getByRole('button', { name: 'Create set' }).click()
  await expect(page.getByRole('alert')).toContainText('2.jpg: it was changed, moved or removed after it was chosen')
  await expect(page.getByText('The set has 2 examples.')).toBeVisible()
  rmSync(folder, { recursive: true })
  await request.delete('/v1/support_sets/changed')
})

test('an evaluation is asked for until the server answers, and a deletion that fails says so', async ({
  page,
  request,
}) => {
  const name = 'asked-for'
  const image = await (await request.post('/v1/images', { data: readFileSync(IMAGE) })).json()
  const media = [{ type: 'image_id', image_id: image.id }]
  const examples = ['red', 'red', 'green', 'green'].map((label) => ({ label, media }))
  await request.post('/v1/support_sets', { data: { name, examples } })
  const fields = { methods: ['nearest_mean'] }
  const { id } = await (await request.post(`/v1/support_sets/${name}/evaluate`, { data: fields })).json()
  await page.route(`/v1/evaluations/${id}`, (route) => route.abort())
  await page.goto(`/#/sets/${name}/evaluations/${id}`)
  await expect(page.getByText('The server cannot be reached.')).toBeVisible()
  await page.unroute(`/v1/evaluations/${id}`)
  await expect(page.getByText('The server cannot be reached.')).toBeHidden()
  await expect(page.getByRole('heading', { name: 'Evaluation of version 1' })).toBeVisible()

  await page.getByRole('link', { name: `All evaluations of ${name}` }).click()
  await page.route(`/v1/evaluations/${id}`, (route) => route.abort())
  await page.getByRole('button', { name: /^Delete the evaluation of/ }).click()
  await expect(page.getByText('The server cannot be reached.')).toBeVisible()
  await request.delete(`/v1/support_sets/${name}`)
})

test('the pictures of a large set are loaded when they come near the view', async ({ page, request }) => {
  const name = 'large'
  const image = await (await request.post('/v1/images', { data: readFileSync(IMAGE) })).json()
  const examples = Array.from({ length: 120 }, (_, index) => ({
    id: `e${index}`,
    label: 'brick',
    media: [{ type: 'image_id', image_id: image.id }],
  }))
  await request.post('/v1/support_sets', { data: { name, examples } })
  await page.goto(`/#/sets/${name}`)
  const pictures = page.getByRole('region', { name: 'brick' }).getByRole('img')
  await expect(pictures.first()).toBeVisible()
  expect(await pictures.count()).toBeLessThan(120)
  await page.getByRole('button', { name: 'Remove brick e119' }).scrollIntoViewIfNeeded()
  await expect(page.getByRole('article').last().getByRole('img')).toBeVisible()
  await request.delete(`/v1/support_sets/${name}`)
})

test('a set is asked for until it is warm, also if the server is away meanwhile', async ({ page, request }) => {
  const name = 'warmed'
  await request.post('/v1/support_sets', { data: { name, examples: [{ text: 'one' }] } })
  await page.route('/v1/support_sets/*/warm', async (route) => {
    const response = await route.fetch()
    await route.fulfill({ response, json: { ...(await response.json()), status: 'warming' } })
  })
  await page.goto(`/#/sets/${name}`)
  await expect(heading(page)).toHaveText(name)
  await page.route(`/v1/support_sets/${name}`, (route) => route.abort())
  await page.getByRole('button', { name: 'Warm' }).click()
  await expect(page.getByText('The server cannot be reached.')).toBeVisible()
  await page.unroute(`/v1/support_sets/${name}`)
  await expect(page.getByText('The server cannot be reached.')).toBeHidden()
  await expect(page.getByText('warm', { exact: true })).toBeVisible()
  await request.delete(`/v1/support_sets/${name}`)
})

test('uploads are cancelled, and can be started again', async ({ page, request }) => {
  await page.goto('/#/sets')
  await page.getByTestId('files').setInputFiles(IMAGE)
  await page.getByLabel('Name').fill('cancelled')
  await page.route('/v1/images', () => undefined) // it is never answered
  await page.getByRole('button', { name: 'Create set' }).click()
  await page.getByRole('button', { name: 'Cancel uploads' }).click()
  await expect(page.getByRole('progressbar')).toHaveCount(0)
  await expect(page.getByRole('alert')).toHaveCount(0)
  await page.unroute('/v1/images')
  await page.getByRole('button', { name: 'Create set' }).click()
  await expect(heading(page)).toHaveText('cancelled')
  await request.delete('/v1/support_sets/cancelled')
})

test('uploads that failed go on where they stopped, and a set is made once', async ({ page, request }) => {
  await page.goto('/#/sets')
  const pictures = Array.from({ length: 8 }, (_, at) => ({
    ...{ name: `${at}.jpg`, mimeType: 'image/jpeg' },
    buffer: Buffer.concat([readFileSync(IMAGE), Buffer.from(`part ${at}`)]),
  }))
  await page.getByTestId('files').setInputFiles(pictures)
  await page.getByLabel('Name').fill('in-parts')
  let numSent = 0
  await page.route('/v1/images', (route) => {
    numSent += 1
    return numSent <= 3 ? route.continue() : route.abort()
  })
  await page.getByRole('button', { name: 'Create set' }).click()
  await expect(page.getByRole('alert')).toContainText('The server cannot be reached.')
  await page.unroute('/v1/images')
  let numAgain = 0
  page.on('request', (sent) => (numAgain += Number(sent.url().endsWith('/v1/images'))))
  // the server makes it, and its response is lost
  await page.route('/v1/support_sets', async (route) => {
    await route.fetch()
    await route.abort()
  })
  await page.getByRole('button', { name: 'Create set' }).click()
  await expect.poll(() => numAgain).toBe(5)
  await expect(page.getByRole('alert')).toHaveText('The server cannot be reached.')
  await page.unroute('/v1/support_sets')
  await page.getByRole('button', { name: 'Create set' }).click()
  await expect(heading(page)).toHaveText('in-parts')
  await expect(page.getByRole('article')).toHaveCount(8)
  expect(numAgain).toBe(5)
  await request.delete('/v1/support_sets/in-parts')
})

test('a removal that failed is shown until the set has another version', async ({ page, request }) => {
  const name = 'removed-twice'
  const examples = ['one', 'two'].map((id) => ({ id, text: id }))
  await request.post('/v1/support_sets', { data: { name, examples } })
  await page.goto(`/#/sets/${name}`)
  await expect(heading(page)).toHaveText(name)
  await request.post(`/v1/support_sets/${name}/examples`, { data: { examples: [{ id: 'three', text: 'three' }] } })
  await page.getByRole('button', { name: 'Remove one one' }).click()
  await expect(page.getByRole('alert')).toContainText('Its version 2 is shown now')
  await page.getByRole('button', { name: 'Edit two two' }).click()
  await page.getByLabel('Text that the model learns to write').fill('second')
  await page.getByRole('button', { name: 'Save as version 3' }).click()
  await expect(page.getByRole('button', { name: 'Edit second two' })).toBeVisible()
  await expect(page.getByRole('alert')).toHaveCount(0)
  await request.delete(`/v1/support_sets/${name}`)
})

test('pictures that the server did not send are asked for again, and those that it refuses are not', async ({
  page,
  request,
}) => {
  const name = 'seen-late'
  const image = await (await request.post('/v1/images', { data: readFileSync(IMAGE) })).json()
  const examples = [{ label: 'brick', media: [{ type: 'image_id', image_id: image.id }] }]
  await request.post('/v1/support_sets', { data: { name, examples } })
  const contents = '/v1/images/*/content'
  let numAsked = 0
  await page.route(contents, (route) => {
    numAsked += 1
    return numAsked === 1 ? route.abort() : route.fulfill({ status: 503, json: { error: { message: 'busy' } } })
  })
  await page.goto(`/#/sets/${name}`)
  await expect(page.getByRole('button', { name: /^Edit brick/ })).toBeVisible()
  await expect.poll(() => numAsked).toBeGreaterThan(1)
  await expect(page.getByRole('img', { name: /no longer on the server/ })).toHaveCount(0)
  await page.unroute(contents)
  await expect(page.getByRole('img', { name: 'brick', exact: true })).toBeVisible()

  await page.route(contents, (route) => route.fulfill({ status: 404, json: { error: { message: 'not found' } } }))
  await page.reload()
  await expect(page.getByRole('img', { name: 'brick (no longer on the server)' })).toBeVisible()
  await request.delete(`/v1/support_sets/${name}`)
})

test('pictures whose upload or addition has failed are added by a button, once', async ({ page, request }) => {
  const name = 'added-once'
  const data = { name, examples: [{ id: 'one', label: 'one' }] }
  const { id } = await (await request.post('/v1/support_sets', { data })).json()
  await page.goto(`/#/sets/${name}`)
  const adding = page.getByRole('region', { name: 'Add examples' })
  const again = adding.getByRole('button', { name: 'Try again' })
  await page.route('/v1/images', (route) => route.abort())
  await adding.getByTestId('files').setInputFiles(IMAGE)
  await expect(adding.getByRole('alert')).toContainText('The server cannot be reached.')
  await page.unroute('/v1/images')

  // the server adds them, and its response is lost
  const address = `/v1/support_sets/${id}/examples`
  await page.route(address, async (route) => {
    await route.fetch()
    await route.abort()
  })
  const sent = page.waitForRequest((request) => request.method() === 'POST' && request.url().endsWith(address))
  await again.click()
  await sent
  await expect(adding.getByRole('alert')).toContainText('The server cannot be reached.')
  await page.unroute(address)
  await again.click()
  await expect(page.getByRole('article')).toHaveCount(2)
  await expect(again).toBeHidden()
  await expect(page.getByText('version 2', { exact: true })).toBeVisible()
  await request.delete(`/v1/support_sets/${name}`)
})

test('evaluations that could not be listed are not said to be none', async ({ page, request }) => {
  const name = 'unlisted'
  await request.post('/v1/support_sets', { data: { name, examples: [{ text: 'one' }] } })
  await page.route(/\/v1\/evaluations\?/, (route) => route.abort())
  await page.goto(`/#/sets/${name}/evaluations`)
  const past = page.getByRole('region', { name: 'Past evaluations' })
  await expect(past.getByRole('alert')).toHaveText('The server cannot be reached.')
  await expect(past.getByText('None yet.')).toHaveCount(0)
  await page.unroute(/\/v1\/evaluations\?/)
  await past.getByRole('button', { name: 'Try again' }).click()
  await expect(past.getByText('None yet.')).toBeVisible()
  await request.delete(`/v1/support_sets/${name}`)
})

test('the examples of the page, and what is inside, are asked for again by a button', async ({ page }) => {
  const again = page.getByRole('button', { name: 'Try again' })
  await page.route('/playground/examples/*', (route) => route.abort())
  await page.goto('/#/inside')
  await expect(page.getByRole('alert')).toHaveText('The server cannot be reached.')
  await page.unroute('/playground/examples/*')
  await page.route('/v1/inspect', (route) => route.abort())
  await again.click()
  await page.getByRole('button', { name: TITLE }).click()
  await expect(again.first()).toBeVisible()
  await page.unroute('/v1/inspect')
  while (await again.count()) await again.first().click()
  await expect(page.getByRole('img', { name: /tokens by .* pictures/ })).toBeVisible()
  await expect(page.getByRole('img', { name: /^64 visual tokens/ }).first()).toBeVisible()
})

test('a set whose examples cannot be read is listed, without an error in the console', async ({ page, request }) => {
  const errors: string[] = []
  page.on('pageerror', (error) => errors.push(error.message))
  await request.post('/v1/support_sets', { data: { name: 'unread', examples: [{ text: 'one' }] } })
  await page.route('/v1/support_sets/*/examples?*', (route) => route.abort())
  const failed = page.waitForEvent('requestfailed')
  await page.goto('/#/sets')
  await failed
  await expect(page.getByRole('link', { name: 'unread', exact: true })).toBeVisible()
  await page.waitForTimeout(200) // an error that no one has caught is reported later
  expect(errors).toEqual([])
  await request.delete('/v1/support_sets/unread')
})

test('the evaluation of another set is not taken for one of this set', async ({ page, request }) => {
  const id = (await (await request.post('/v1/images', { data: readFileSync(IMAGE) })).json()).id
  const examples = ['red', 'red', 'green', 'green'].map((label) => ({
    label,
    media: [{ type: 'image_id', image_id: id }],
  }))
  for (const name of ['this', 'other']) await request.post('/v1/support_sets', { data: { name, examples } })
  const evaluate = { data: { methods: ['nearest_mean'] } }
  const evaluation = await (await request.post('/v1/support_sets/other/evaluate', evaluate)).json()
  const notice = page.getByText('The evaluation of this address belongs to another set.')

  await page.goto(`/#/sets/this/use/${evaluation.id}`)
  await expect(notice).toBeVisible()
  await expect(page.getByText('This version has not been evaluated')).toBeVisible()
  await page.goto(`/#/sets/this/evaluations/${evaluation.id}`)
  await expect(notice).toBeVisible()
  await expect(page.getByRole('heading', { name: 'Evaluation of version 1' })).toHaveCount(0)
  await page.getByRole('link', { name: 'Show it with its set' }).click()
  await expect(heading(page)).toHaveText('other')
  await expect(page.getByRole('heading', { name: 'Evaluation of version 1' })).toBeVisible()
  await expect(notice).toHaveCount(0)
  for (const name of ['this', 'other']) await request.delete(`/v1/support_sets/${name}`)
})

test('an evaluation that is read late is not shown for another address', async ({ page, request }) => {
  const id = (await (await request.post('/v1/images', { data: readFileSync(IMAGE) })).json()).id
  const media = [{ type: 'image_id', image_id: id }]
  const examples = ['red', 'red', 'green', 'green'].map((label) => ({ label, media }))
  const evaluate = async (name: string): Promise<string> => {
    await request.post('/v1/support_sets', { data: { name, examples } })
    const fields = { methods: ['nearest_mean'] }
    return (await (await request.post(`/v1/support_sets/${name}/evaluate`, { data: fields })).json()).id
  }
  const [own, foreign] = [await evaluate('punctual'), await evaluate('late')]
  const notice = page.getByText('The evaluation of this address belongs to another set.')
  const open = (evaluation: string) => page.evaluate(`location.hash = '#/sets/punctual/use/${evaluation}'`)

  const arrived = hold(page, `/v1/evaluations/${foreign}`)
  await page.goto(`/#/sets/punctual/use/${foreign}`)
  await expect(heading(page)).toHaveText('punctual')
  const read = page.waitForResponse(`/v1/evaluations/${own}`)
  await open(own)
  await read
  await arrived()
  await page.waitForTimeout(200)
  await expect(notice).toHaveCount(0)

  // the notice is about the address before, also if the next one cannot be read
  await open(foreign)
  await expect(notice).toBeVisible()
  await page.route(`/v1/evaluations/${own}`, (route) => route.abort())
  await open(own)
  await expect(page.getByText('The server cannot be reached.')).toBeVisible()
  await expect(notice).toHaveCount(0)
  for (const name of ['punctual', 'late']) await request.delete(`/v1/support_sets/${name}`)
})

/** Holds the requests to an address. Returns a function that lets them go on, and waits until one is answered. */
function hold(page: Page, address: string): () => Promise<void> {
  let release = () => {}
  const held = new Promise<void>((resolve) => (release = resolve))
  void page.route(address, async (route) => {
    await held
    await route.continue()
  })
  return async () => {
    const answered = page.waitForResponse((response) => new URL(response.url()).pathname === address)
    release()
    await answered
    await page.unroute(address)
  }
}

/** Returns the path of an archive of a set that the server has no more. */
async function archiveOf(name: string, request: APIRequestContext, folder: string): Promise<string> {
  const archive = join(folder, `${name}.zip`)
  await request.post('/v1/support_sets', { data: { name, examples: [{ text: 'one' }] } })
  writeFileSync(archive, await (await request.get(`/v1/support_sets/${name}/export`)).body())
  await request.delete(`/v1/support_sets/${name}`)
  return archive
}

test('an import that ends or fails while another set is begun says so, and leaves that set', async ({
  page,
  request,
}) => {
  const folder = mkdtempSync(join(tmpdir(), 'playground-'))
  const archive = await archiveOf('archived', request, folder)
  let release = () => {}
  const held = new Promise<void>((resolve) => (release = resolve))
  await page.route('/v1/support_sets/import', async (route) => {
    await held
    await route.abort()
  })
  await page.goto('/#/sets')
  await page.getByTestId('archive').setInputFiles(archive)
  await page.getByRole('button', { name: 'Empty set' }).click()
  await page.getByLabel('Name').fill('begun')
  await expect(page.getByText('Importing …')).toBeVisible()
  release()
  await expect(page.getByRole('alert')).toHaveText('The server cannot be reached.')
  await page.unroute('/v1/support_sets/import')
  await page.getByRole('button', { name: 'Try again' }).click()
  await expect(page.getByRole('link', { name: 'Open archived' })).toBeVisible()
  await expect(page.getByLabel('Name')).toHaveValue('begun')
  await page.getByRole('button', { name: 'Create set' }).click()
  await expect(heading(page)).toHaveText('begun')
  for (const name of ['archived', 'begun']) await request.delete(`/v1/support_sets/${name}`)
  rmSync(folder, { recursive: true })
})

test('an import leads nowhere when the view was left and opened again meanwhile', async ({ page, request }) => {
  const folder = mkdtempSync(join(tmpdir(), 'playground-'))
  const archive = await archiveOf('left', request, folder)
  const arrived = hold(page, '/v1/support_sets/import')
  await page.goto('/#/sets')
  await page.getByTestId('archive').setInputFiles(archive)
  await page.getByRole('link', { name: 'Try', exact: true }).click()
  await page.getByRole('link', { name: 'Support sets' }).click()
  await page.getByRole('button', { name: 'Empty set' }).click()
  await page.getByLabel('Name').fill('begun')
  await arrived()
  await page.waitForTimeout(200)
  await expect(page.getByLabel('Name')).toHaveValue('begun')
  await request.delete('/v1/support_sets/left')
  rmSync(folder, { recursive: true })
})

test('an archive is imported once, also if the response was lost and the file is chosen again', async ({
  page,
  request,
}) => {
  const folder = mkdtempSync(join(tmpdir(), 'playground-'))
  const archive = await archiveOf('imported', request, folder)
  const numSets = async () => (await (await request.get('/v1/support_sets')).json()).data.length
  const before = await numSets()

  await page.goto('/#/sets')
  await expect(page.getByRole('button', { name: 'Import an archive' })).toBeEnabled()
  await page.route('/v1/support_sets/import', async (route) => {
    await route.fetch()
    await route.abort()
  })
  const again = page.getByRole('button', { name: 'Try again' })
  await page.getByTestId('archive').setInputFiles(archive)
  await expect(page.getByRole('alert')).toHaveText('The server cannot be reached.')
  await again.click()
  await expect(again).toBeEnabled()
  await page.unroute('/v1/support_sets/import')
  await page.getByTestId('archive').setInputFiles(archive)
  await expect(heading(page)).toHaveText('imported')
  expect(await numSets()).toBe(before + 1)
  await request.delete('/v1/support_sets/imported')
  rmSync(folder, { recursive: true })
})
