// Support sets in the steps of a person: from a folder to a request that answers in a shell.
import AxeBuilder from '@axe-core/playwright'
import { expect, test, type Locator, type Page } from '@playwright/test'
import { execFileSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync, cpSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { percent } from '../src/charts/format'

const TEXTURES = '../../docs/examples/textures'
const LABELS = ['brick', 'grass', 'gravel']
const python = process.env.PYTHON ?? '../../.venv/bin/python'

test.describe.configure({ mode: 'serial' })

test.beforeEach(async ({ page }) => {
  page.on('pageerror', (error) => {
    throw error
  })
})

/** Checks the page as it is in light and dark, and that it fits a phone. */
async function expectAccessible(page: Page) {
  for (const colorScheme of ['dark', 'light'] as const) {
    await page.emulateMedia({ colorScheme, reducedMotion: 'reduce' })
    const { violations } = await new AxeBuilder({ page }).analyze()
    const grave = violations.filter(({ impact }) => impact === 'serious' || impact === 'critical')
    expect(grave.map(({ id, nodes }) => `${id}: ${nodes.map(({ html }) => html).join(' ')}`)).toEqual([])
  }
  const size = page.viewportSize()!
  await page.setViewportSize({ width: 360, height: 740 })
  await expect.poll(() => page.evaluate(() => document.documentElement.scrollWidth)).toBeLessThanOrEqual(360)
  await page.setViewportSize(size)
}

const tab = (page: Page, name: string) =>
  page.getByRole('navigation', { name: 'Parts of the set' }).getByRole('link', { name })

const pictures = (part: Locator) => part.getByRole('img')

test('a folder becomes a set whose labels are the subfolders, and a file that is no image is named', async ({
  page,
}) => {
  const folder = mkdtempSync(join(tmpdir(), 'playground-'))
  cpSync(`${TEXTURES}/shots`, join(folder, 'textures'), { recursive: true })
  writeFileSync(join(folder, 'textures', 'brick', 'notes.txt'), 'no image')

  await page.goto('/#/sets')
  await page.getByTestId('folder').setInputFiles(join(folder, 'textures'))
  await expect(page.getByRole('list', { name: 'Labels' }).getByRole('listitem')).toHaveText([
    /brick\s*3/,
    /grass\s*2/,
    /gravel\s*2/,
  ])
  await expect(page.getByLabel('Name')).toHaveValue('textures')
  await page.getByRole('button', { name: 'Create set' }).click()

  await expect(page.getByRole('alert')).toContainText('Left out: 1 file')
  await expect(page.getByRole('alert')).toContainText('notes.txt')
  await page.getByRole('link', { name: 'Open textures' }).click()
  rmSync(folder, { recursive: true }) // the browser reads a file when it uploads it
  await expect(page.getByRole('heading', { level: 1 })).toHaveText('textures')
  for (const label of LABELS) await expect(pictures(page.getByRole('region', { name: label }))).toHaveCount(2)
  await expectAccessible(page)
})

test('labels and names are those of the Python client, and a single example of a label allows all methods', async ({
  page,
}) => {
  const folder = mkdtempSync(join(tmpdir(), 'playground-'))
  const root = join(folder, 'Vögel & Bäume')
  const files = { brick: ['old/1.jpg', 'new/2.jpg'], grass: ['1.jpg', '2.jpg'], ['Käfer'.normalize('NFD')]: ['1.jpg'] }
  for (const [label, names] of Object.entries(files))
    for (const name of names) cpSync(`${TEXTURES}/shots/brick/1.jpg`, join(root, label, name), { recursive: true })
  cpSync(`${TEXTURES}/queries/grass/3.jpg`, join(root, 'loose.jpg'))

  await page.goto('/#/sets')
  await page.getByTestId('folder').setInputFiles(root)
  await expect(page.getByLabel('Name')).toHaveValue('Vogel-Baume')
  const labels = page.getByRole('list', { name: 'Labels' }).getByRole('listitem')
  await expect(labels.filter({ hasText: 'brick' })).toHaveText(/brick\s*2/)
  await expect(labels.filter({ hasText: 'Käfer'.normalize('NFC') })).toHaveCount(1)
  await expect(labels.filter({ hasText: 'no label' })).toHaveText(/no label\s*1/)
  await expect(page.getByText('Pictures in no subfolder get no label.')).toBeVisible()

  rmSync(join(root, 'loose.jpg'))
  await page.getByRole('button', { name: 'Cancel' }).click()
  await page.getByTestId('folder').setInputFiles(root)
  await page.getByRole('button', { name: 'Create set' }).click()
  await expect(page.getByRole('heading', { level: 1 })).toHaveText('Vogel-Baume')
  rmSync(folder, { recursive: true })
  await tab(page, 'Evaluate').click()
  await expect(page.getByRole('checkbox', { name: /^Nearest mean/ })).toBeChecked()
  await page.route('**/evaluate', (route) => route.abort())
  const requests = page.waitForRequest('**/evaluate')
  await page.getByRole('button', { name: 'Evaluate' }).click()
  expect((await requests).postDataJSON()).not.toHaveProperty('methods')
  await page.getByRole('checkbox', { name: /^Blend/ }).uncheck()
  const named = page.waitForRequest('**/evaluate')
  await page.getByRole('button', { name: 'Evaluate' }).click()
  expect((await named).postDataJSON().methods).toEqual(['nearest_mean', 'knn', 'linear', 'in_context'])
})

test('an example is edited, filtered, found by a picture and removed, and versions are compared', async ({ page }) => {
  await page.goto('/#/sets/textures')
  await page
    .getByRole('button', { name: /^Edit brick/ })
    .first()
    .click()
  await page.getByLabel('Label', { exact: true }).fill('wall')
  await page.getByRole('button', { name: 'Save as version 2' }).click()
  await expect(page.getByText('version 2', { exact: true })).toBeVisible()
  const words = page.getByRole('searchbox', { name: 'Find examples by their words' })
  await words.fill('GRA')
  await expect(page.getByRole('article')).toHaveCount(4) // of grass and gravel
  await words.fill('cat')
  await expect(page.getByText('No example has these words.')).toBeVisible()
  await words.fill('')
  await page.getByRole('button', { name: /^wall/ }).click()
  await expect(page.getByRole('region', { name: 'brick' })).toBeHidden()
  await expect(pictures(page.getByRole('region', { name: 'wall' }))).toHaveCount(1)

  const search = page.getByRole('region', { name: 'Search by picture' })
  await search.getByTestId('files').setInputFiles(`${TEXTURES}/queries/grass/3.jpg`)
  await expect(search.getByRole('list', { name: 'Similar examples' }).getByRole('listitem').first()).toContainText(
    'grass',
  )

  await page.getByRole('button', { name: /^Edit wall/ }).click()
  await page.getByLabel('Label', { exact: true }).fill('brick')
  await page.getByRole('button', { name: 'Save as version 3' }).click()
  await page.getByRole('button', { name: /^All/ }).click()
  const add = page.getByRole('region', { name: 'Add examples' })
  await add.getByLabel('Label of pictures').fill('moss')
  await add.getByTestId('files').setInputFiles(`${TEXTURES}/queries/grass/3.jpg`)
  await expect(page.getByText('version 4', { exact: true })).toBeVisible()
  await page.getByRole('button', { name: /^Remove moss/ }).click()
  await expect(page.getByText('version 5', { exact: true })).toBeVisible()

  await tab(page, 'Versions').click()
  await page.getByLabel('From version').selectOption('1')
  await page.getByLabel('To version').selectOption('2')
  await expect(page.getByRole('list', { name: 'Changed' })).toContainText('label: brick → wall')
  await page.getByLabel('From version').selectOption('3')
  await page.getByLabel('To version').selectOption('4')
  await expect(page.getByRole('list', { name: 'Added' })).toContainText('moss')
  await page.getByLabel('To version').selectOption('5')
  await expect(page.getByText('The two versions have the same examples.')).toBeVisible()
  await expectAccessible(page)
})

test('a set is warmed', async ({ page }) => {
  await page.goto('/#/sets/textures')
  await page.getByRole('button', { name: 'Warm' }).click()
  await expect(page.getByText('warm', { exact: true })).toBeVisible()
})

test('a set is evaluated, and the results stay after a reload', async ({ page }) => {
  test.slow() // dozens of answers of the language model
  await page.goto('/#/sets/textures/evaluations')
  await expectAccessible(page)
  const shots = page.getByRole('group', { name: 'Shots in the prompt' })
  for (const number of ['1', '2']) await shots.getByRole('checkbox', { name: number, exact: true }).uncheck()
  await page.getByText('More options').click()
  await page.getByRole('checkbox', { name: 'On plain features' }).check()
  await page.getByRole('button', { name: 'Evaluate' }).click()
  await expect(page.getByRole('progressbar')).toBeVisible()
  await expect(page.getByRole('link', { name: 'Apply recommendation' })).toBeVisible({ timeout: 300_000 })
  await expect(page).toHaveURL(/evaluations\/\w+/)

  await page.reload()
  const byMethod = page.getByRole('table', { name: /Accuracy by method/ })
  await expect(byMethod.getByRole('row', { name: /Nearest mean/ })).toContainText('100%')
  await expect(byMethod.getByRole('row')).toHaveCount(6)
  await expect(page.getByText(/always “brick”, or chance/).first()).toBeVisible()
  await expect(page.getByRole('img', { name: /Accuracy by number of shots/ })).toBeVisible()
  await expect(page.getByRole('img', { name: /Calibration/ })).toBeVisible()
  await expect(page.getByRole('img', { name: /surest queries/ })).toBeVisible()

  await page.getByText('brick, answered rightly').scrollIntoViewIfNeeded() // thumbnails are loaded when they are near
  await expect(page.getByRole('img', { name: 'brick', exact: true })).toHaveCount(2)
  const setting = page.getByLabel('Setting in detail')
  await expect(setting.locator('option', { hasText: 'Nearest mean, on plain features: ' })).toHaveCount(1)
  const wrong = await setting
    .locator('option', { hasText: /no shots: \d\d?%/ })
    .first()
    .textContent()
  await setting.selectOption({ label: wrong! })
  await expect(page.getByRole('button', { pressed: true, name: /answered/ })).not.toHaveAccessibleName(
    /of (\w+) answered \1$/,
  )
  await expect(page.getByText(/^\w+, answered(?! rightly)/)).toBeVisible()
  await setting.selectOption({ index: 0 })
  await page.getByRole('button', { name: '2 of grass answered grass' }).focus()
  await expect(page.getByText('grass, answered rightly')).toBeVisible()
  await expect(page.getByRole('img', { name: 'grass', exact: true })).toHaveCount(2)
  await expectAccessible(page)

  await page.getByRole('link', { name: 'All evaluations of textures' }).click()
  await expect(page.getByRole('table').getByRole('link')).toHaveCount(1)
})

test('the recommendation classifies pictures, and its request is answered in a shell', async ({ page, context }) => {
  await context.grantPermissions(['clipboard-read', 'clipboard-write'])
  await page.goto('/#/sets/textures/evaluations')
  await page.getByRole('table').getByRole('link').click()
  await page.getByRole('link', { name: 'Apply recommendation' }).click()
  await expect(page.getByText('as recommended by')).toBeVisible()
  for (const label of LABELS) {
    await page.getByTestId('files').setInputFiles(`${TEXTURES}/queries/${label}/3.jpg`)
    await expect(page.getByTestId('label')).toHaveText(label)
  }
  await expect(page.getByRole('list', { name: 'Probabilities' }).getByRole('listitem')).toHaveCount(3)

  await page.getByRole('button', { name: 'Copy' }).click()
  const command = await page.evaluate(() => navigator.clipboard.readText())
  const answer = JSON.parse(
    execFileSync('sh', ['-c', command], { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] }),
  )
  expect(answer.label).toBe('gravel')

  await page.getByRole('button', { name: 'Python' }).click()
  await page.getByRole('button', { name: 'Copy' }).click()
  const program = await page.evaluate(() => navigator.clipboard.readText())
  expect(execFileSync(python, ['-c', program], { encoding: 'utf8' })).toMatch(/^gravel /)
  await expectAccessible(page)
})

test('a target withholds the label of a query that is not sure enough', async ({ page }) => {
  await page.goto('/#/sets/textures/use')
  await page.getByTestId('files').setInputFiles('../../docs/examples/noto-banana.png')
  await expect(page.getByTestId('label')).toBeVisible()
  await page.getByLabel('Give a label only if').selectOption({ label: 'so that 99% of the labels are right' })
  await expect(page.getByText('threshold')).toBeVisible()
  await page.route('/v1/classify', async (route) => {
    const response = await route.fetch()
    await route.fulfill({ response, json: { ...(await response.json()), label: null, threshold: 1 } })
  })
  await page.getByLabel('Give a label only if').selectOption({ label: 'so that 95% of the labels are right' })
  await expect(page.getByText('Even the surest examples do not reach the target')).toBeVisible()
})

test('long labels fit a phone, and the shown tab is in view', async ({ page, request }) => {
  const labels = [
    'Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft',
    'grass '.repeat(20),
  ]
  const name = 'long-labels'
  const image = async (file: string) =>
    (await (await request.post('/v1/images', { data: readFileSync(`${TEXTURES}/shots/${file}`) })).json()).id
  const ids = await Promise.all(['brick/1.jpg', 'brick/2.jpg', 'grass/1.jpg', 'grass/2.jpg'].map(image))
  // the second and the third have each other's label
  const examples = [0, 1, 0, 1].map((label, at) => ({
    label: labels[label],
    media: [{ type: 'image_id', image_id: ids[at] }],
  }))
  await request.post('/v1/support_sets', { data: { name, examples } })
  const { id } = await (
    await request.post(`/v1/support_sets/${name}/evaluate`, { data: { methods: ['nearest_mean'] } })
  ).json()

  for (const part of ['examples', 'diagnostics', `evaluations/${id}`, 'versions']) {
    await page.goto(`/#/sets/${name}/${part}`)
    await expect(page.getByRole('heading', { level: 1 })).toHaveText(name)
    await page.waitForLoadState('networkidle')
    await expectAccessible(page)
  }
  await page.setViewportSize({ width: 390, height: 844 })
  await page.reload()
  await expect(tab(page, 'Versions')).toBeInViewport({ ratio: 1 })

  await page.goto(`/#/sets/${name}/evaluations/${id}`)
  const head = page.getByRole('region', { name: 'Confusion matrix' }).getByRole('row').first()
  await expect(head).toBeVisible()
  expect((await head.boundingBox())!.height).toBeLessThan(120)
  await request.delete(`/v1/support_sets/${name}`)
})

test('a share that is not all is not 100%', () => {
  expect([1, 199 / 200, 0.99996, 0.5, 1 / 300, 1e-6, 0].map((share) => percent(share))).toEqual([
    ...['100%', '99.5%', '> 99.9%', '50%', '0.3%', '< 0.1%', '0%'],
  ])
})

test('diagnostics find a wrong label, and a button mends it', async ({ page }) => {
  await page.goto('/#/sets')
  await page.getByTestId('folder').setInputFiles(`${TEXTURES}/shots`)
  await page.getByLabel('Name').fill('mislabelled')
  await page.getByRole('button', { name: 'Create set' }).click()
  await expect(page.getByRole('heading', { level: 1 })).toHaveText('mislabelled')
  const add = page.getByRole('region', { name: 'Add examples' })
  await add.getByLabel('Label of pictures').fill('grass')
  await add.getByTestId('files').setInputFiles(`${TEXTURES}/shots/brick/1.jpg`)
  await expect(page.getByText('version 2', { exact: true })).toBeVisible()

  await tab(page, 'Diagnostics').click()
  const conflicts = page.getByRole('region', { name: 'Contradictions' })
  await expect(conflicts).toContainText('the same file')
  await expectAccessible(page)
  await conflicts.getByRole('button', { name: 'Remove the \u2068grass\u2069' }).click()
  await expect(page.getByText('version 3', { exact: true })).toBeVisible()
  await expect(conflicts).toBeHidden()
})

test('an evaluation shows the time that is left, and is cancelled', async ({ page }) => {
  await page.route('/v1/evaluations/*', async (route) => {
    const response = await route.fetch()
    const report = await response.json()
    await route.fulfill({ response, json: { ...report, progress: { ...report.progress, seconds_left: 130 } } })
  })
  await page.goto('/#/sets/textures/evaluations')
  await page.getByText('More options').click()
  await page.getByLabel('Draws of random shots').fill('8')
  await page.getByRole('button', { name: 'Evaluate' }).click()
  await expect(page.getByText(/ settings, about 2 min left/)).toBeVisible()
  await page.getByRole('button', { name: 'Cancel' }).click()
  await expect(page.getByText('It was cancelled.')).toBeVisible()
})

test('an archive moves a set, and a set is deleted', async ({ page }) => {
  await page.goto('/#/sets/textures')
  const download = page.waitForEvent('download')
  await page.getByRole('button', { name: 'Export' }).click()
  const archive = await (await download).path()
  await page.getByRole('button', { name: 'Delete', exact: true }).click()
  await page.getByRole('button', { name: 'Delete textures' }).click()
  await expect(page.getByRole('heading', { level: 1 })).toHaveText('Support sets')
  await expect(page.getByRole('link', { name: 'textures' })).toBeHidden()

  await page.getByTestId('archive').setInputFiles(archive)
  await expect(page.getByRole('heading', { level: 1 })).toHaveText('textures')
  for (const label of LABELS) await expect(pictures(page.getByRole('region', { name: label }))).toHaveCount(2)
})

test('a set is made without examples', async ({ page }) => {
  await page.goto('/#/sets')
  await page.getByRole('button', { name: 'Empty set' }).click()
  await page.getByLabel('Name').fill('empty')
  await page.getByRole('button', { name: 'Create set' }).click()
  await expect(page.getByText('This set has no examples yet.')).toBeVisible()
  await tab(page, 'Evaluate').click()
  await expect(page.getByText('An evaluation needs at least two examples.')).toBeVisible()
})

test('a set of texts alone is evaluated, and classifies a text', async ({ page, request }) => {
  const name = 'parity'
  const examples = [0, 1, 2, 3].map((at) => ({ question: `Is ${at} odd or even?`, label: at % 2 ? 'odd' : 'even' }))
  await request.post('/v1/support_sets', { data: { name, examples } })
  await page.route('/v1/evaluations/*', async (route) => {
    const response = await route.fetch()
    const report = await response.json()
    // the first answers come after the examples have been prepared
    if (report.progress.queries_done) await route.fulfill({ response })
    else await route.fulfill({ response, json: { ...report, status: 'running' } })
  })
  await page.goto(`/#/sets/${name}/evaluations`)
  await page.getByRole('button', { name: 'Evaluate' }).click()
  await expect(page.getByText('Preparing the examples …')).toBeVisible()
  await expect(page.getByText('Accuracy by number of shots', { exact: true })).toBeVisible()
  await expectAccessible(page)

  await tab(page, 'Use it').click()
  await page.getByLabel('Question to classify').fill('Is 5 odd or even?')
  await page.getByLabel('Question to classify').press('Enter')
  await expect(page.getByTestId('label')).toHaveText(/^(odd|even)$/)
  await page.getByRole('button', { name: 'Python' }).click()
  const program = await page.getByRole('region', { name: 'This request as code' }).locator('pre').innerText()
  expect(execFileSync(python, ['-c', program], { encoding: 'utf8' })).toMatch(/^(odd|even) /)
  await expectAccessible(page)
  await request.delete(`/v1/support_sets/${name}`)
})

test('texts without an answer beside them are not evaluated', async ({ page, request }) => {
  await request.post('/v1/support_sets', { data: { name: 'words', examples: [{ text: 'one' }, { text: 'two' }] } })
  await page.goto('/#/sets/words/evaluations')
  await expect(page.getByText('Without pictures, each example needs a question, or a text and a label.')).toBeVisible()
  await request.delete('/v1/support_sets/words')
})
