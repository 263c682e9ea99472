// Try, in the steps of its users: examples, own pictures, the slider, the copied request, a reload.
import AxeBuilder from '@axe-core/playwright'
import { expect, test, type Page } from '@playwright/test'
import { execFileSync } from 'node:child_process'
import { copyFileSync, mkdirSync, mkdtempSync, readFileSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'

const EXAMPLES = resolve('public/examples')
const answer = (page: Page) => page.getByTestId('answer')
const slider = (page: Page) => page.getByRole('slider', { name: 'Shots that the model is shown' })
const column = (page: Page, shots: number) =>
  page.getByRole('list', { name: 'The answer by number of shots' }).getByRole('listitem').nth(shots).getByRole('button')
const cost = (page: Page, name: string) => page.locator('dl > div', { hasText: name }).getByRole('definition')

async function openExample(page: Page, title: string) {
  await page.goto('/')
  await page.getByRole('button', { name: title }).click()
  await expect(page.getByRole('button', { name: /^Ask with 0 to/ })).toBeEnabled() // it has asked with every number
}

async function expectAnswers(page: Page, expected: Record<string, string>) {
  for (const [picture, word] of Object.entries(expected)) {
    await page.getByRole('button', { name: `Ask about ${picture}` }).click()
    await expect(answer(page)).toHaveText(word)
    await expect(page.getByText('✓ as expected')).toBeVisible()
  }
}

/** A folder with a subfolder per word, in which the texts of nine shots are. */
function folderOfShots(): string {
  const folder = join(mkdtempSync(join(tmpdir(), 'shots-')), 'pictures')
  const words = { dax: 'noto-elephant', wug: 'noto-bicycle', blicket: 'noto-banana' }
  const files = Object.entries(words).map(([word, name]) => [word, `${name}.png`])
  for (const texture of ['brick', 'grass', 'gravel'])
    files.push([texture, `${texture}-1.jpg`], [texture, `${texture}-2.jpg`])
  for (const [word, file] of files as [string, string][]) {
    mkdirSync(join(folder, word), { recursive: true })
    copyFileSync(join(EXAMPLES, file), join(folder, word, file))
  }
  return folder
}

test('drawings with made-up words: the word appears with the shot that has it', async ({ page }) => {
  await openExample(page, 'Drawings with made-up words')
  await expect(answer(page)).toHaveText('wug')
  await expect(column(page, 3)).toHaveAccessibleName(/^3 shots: wug, \d+%$/)
  await expect(column(page, 2)).toHaveAccessibleName(/^2 shots: wug, \d+%$/)
  for (const shots of [0, 1]) {
    await expect(column(page, shots)).not.toHaveAccessibleName(/wug|not asked/)
  }
  await expect(
    page.getByRole('group', { name: 'Tokens of the answer' }).getByRole('button').first(),
  ).toHaveAccessibleName(/^␣\S+, .*\d+%$/)
  await expectAnswers(page, { 'fluent-banana.png': 'blicket', 'fluent-elephant.png': 'dax' })
  await expect(cost(page, 'Pages reused')).toHaveText('3')
  await expect(cost(page, 'To the first token')).toHaveText(/^[1-9]\d* ms$/)
})

test('textures are named, and chosen by every method', async ({ page }) => {
  await openExample(page, 'Textures')
  const expected = { 'gravel-3.jpg': 'stones', 'grass-3.jpg': 'grass', 'brick-3.jpg': 'brick' }
  await expectAnswers(page, expected)
  await page.getByRole('button', { name: 'Choose', exact: true }).click()
  await expectAnswers(page, expected)
  for (const method of ['in_context', 'nearest_mean', 'knn', 'linear', 'blend']) {
    await page.getByLabel('Method').selectOption(method)
    await expect(page.getByText(`by ${method.replace('_', ' ')}`)).toBeVisible()
    await expect(answer(page)).toHaveText('brick')
  }
  await expect(
    page.getByRole('list', { name: 'The labels and their probabilities' }).getByRole('listitem'),
  ).toHaveCount(3)
})

test('the moving drawing is named', async ({ page }) => {
  await openExample(page, 'A video')
  await expect(answer(page)).toHaveText('wug')
})

test('a video stands still for a person who wants less motion', async ({ page }) => {
  await page.emulateMedia({ reducedMotion: 'reduce' })
  await page.goto('/')
  await page.getByRole('button', { name: 'A video' }).click()
  const video = page.locator('video').first()
  await expect(video).toHaveJSProperty('readyState', 4)
  await expect(video).toHaveJSProperty('paused', true)
})

test('a folder of pictures, shots 0 to 8 by keyboard, and a reload that keeps everything', async ({ page }) => {
  await page.goto('/')
  await page.getByTestId('folder').setInputFiles(folderOfShots())
  await expect(page.getByRole('textbox', { name: /^Text of shot/ })).toHaveCount(9)
  const texts = await page
    .getByRole('textbox', { name: /^Text of shot/ })
    .evaluateAll((all) => all.map((input) => (input as HTMLInputElement).value))
  expect(new Set(texts.slice(0, 6)).size).toBe(6) // the folders take turns
  await page.getByTestId('files').last().setInputFiles(join(EXAMPLES, 'fluent-bicycle.png'))
  await expect(answer(page)).toHaveText('wug')

  await slider(page).focus()
  await page.keyboard.press('Home')
  for (let shots = 0; shots <= 8; shots++) {
    await expect(slider(page)).toHaveValue(`${shots}`)
    await expect(column(page, shots)).toHaveAccessibleName(/%$/)
    await page.keyboard.press('ArrowRight')
  }
  await expect(column(page, 0)).not.toHaveAccessibleName(/wug/)
  await expect(column(page, 8)).toHaveAccessibleName(/wug/)

  await page.keyboard.press('Home')
  const first = await answer(page).textContent()
  await page.waitForTimeout(600) // the page keeps its state after a pause
  await page.reload()
  await expect(slider(page)).toHaveValue('0')
  await expect(answer(page)).toHaveText(first!)
  await expect(column(page, 8)).toHaveAccessibleName(/wug/)
  await expect(page.getByRole('textbox', { name: /^Text of shot/ })).toHaveCount(9)
  await expect(page.getByRole('img', { name: 'The query: fluent-bicycle.png' })).toBeVisible()
})

test('the first view has no slider of no shots, but says what comes', async ({ page }) => {
  await page.goto('/')
  await expect(page.getByText('Open an example above, or add shots.')).toBeVisible()
  await expect(slider(page)).toBeHidden()
  await expect(page.getByRole('button', { name: /^Ask with/ })).toHaveCount(0)
})

test('tabs keep their own shots, and a new one begins with the latest', async ({ page, context }) => {
  const texts = (tab: Page) => tab.getByRole('textbox', { name: /^Text of shot/ })
  await openExample(page, 'Drawings with made-up words')
  await expect(texts(page)).toHaveCount(3)
  await page.waitForTimeout(600) // the page keeps its state after a pause
  const other = await context.newPage()
  await other.goto('/')
  await expect(texts(other).first()).toHaveValue('dax')
  await openExample(other, 'Textures')
  await expect(texts(other).first()).toHaveValue('brick')
  await other.waitForTimeout(600)

  await page.reload()
  await expect(texts(page).first()).toHaveValue('dax')
  await page.close() // it has changed nothing since, so it overwrites nothing
  const third = await context.newPage()
  await third.goto('/')
  await expect(texts(third).first()).toHaveValue('brick')
})

test('captions are typed one after the other, and an answer that is too long ends with an ellipsis', async ({
  page,
}) => {
  const choice = { text: ' an elephant that', index: 0, logprobs: null, finish_reason: 'length' }
  const events = [JSON.stringify({ choices: [choice] }), '[DONE]']
  await page.route('/v1/completions', (route) =>
    route.fulfill({ contentType: 'text/event-stream', body: events.map((data) => `data: ${data}\n\n`).join('') }),
  )
  await openExample(page, 'Drawings with made-up words')
  await expect(page.getByText('an elephant that…')).toBeVisible()
  await expect(page.getByText(/^expected/)).toBeVisible()
  const texts = page.getByRole('textbox', { name: /^Text of shot/ })
  const caption = 'a grey elephant with large ears and two long white tusks'
  const height = (await texts.first().boundingBox())!.height
  await texts.first().fill(caption)
  expect((await texts.first().boundingBox())!.height).toBeGreaterThan(2 * height)
  await page.keyboard.press('Enter')
  await page.keyboard.type('a blue bicycle')
  await expect(texts.first()).toHaveValue(caption)
  await expect(page.getByText('Probability')).toBeVisible()
  await expect(page.getByText(/^expected|✓ as expected/)).toHaveCount(0) // no shot has the word of the query any more
  await expect(texts.nth(1)).toHaveValue('a blue bicycle')
})

test('an answer with a full stop is not cut at it, and the place of the answer is used once', async ({ page }) => {
  const choice = { text: ' St. Bernard.', index: 0, logprobs: null, finish_reason: 'stop' }
  const events = [JSON.stringify({ choices: [choice] }), '[DONE]']
  await page.route('/v1/completions', (route) =>
    route.fulfill({ contentType: 'text/event-stream', body: events.map((data) => `data: ${data}\n\n`).join('') }),
  )
  await openExample(page, 'Drawings with made-up words')
  const request = page.waitForRequest((request) => request.postData()?.includes('St. Bernard') ?? false)
  await page.getByRole('textbox', { name: 'Text of shot 1' }).fill('St. Bernard')
  expect((await request).postDataJSON()).not.toHaveProperty('stop')
  await expect(answer(page)).toHaveText('St. Bernard')
  await page.getByLabel('Sentence').fill('{answer} or {answer}')
  await expect(page.getByText('Use {answer} once.')).toBeVisible()
  const withoutPlace = page.waitForRequest((request) => request.postData()?.includes('It shows') ?? false)
  await page.getByLabel('Sentence').fill('It shows a')
  expect((await withoutPlace).postData()).toContain('It shows a St. Bernard')
})

test('a picture in a format that browsers do not show is used like any other', async ({ page }) => {
  await page.goto('/')
  const tiff = { name: 'red.tiff', mimeType: 'image/tiff', buffer: Buffer.from(TIFF, 'base64') }
  await page.getByTestId('files').first().setInputFiles(tiff)
  const picture = page.getByRole('img', { name: 'red.tiff (this browser does not show its format)' })
  await expect(picture).toHaveText('no preview')
  await page.getByRole('textbox', { name: 'Text of shot 1' }).fill('red')
  await page.getByTestId('files').last().setInputFiles(tiff)
  await expect(answer(page)).not.toBeEmpty()
})

/** An image of 3 by 2 pixels. */
const TIFF =
  'SUkqAAgAAAAKAAABBAABAAAAAwAAAAEBBAABAAAAAgAAAAIBAwADAAAAhgAAAAMBAwABAAAAAQAAAAYBAwABAAAAAgAAABEBBAABAAAAjAAAABUBAwAB' +
  'AAAAAwAAABYBBAABAAAAAgAAABcBBAABAAAAEgAAABwBAwABAAAAAQAAAAAAAAAIAAgACADIHh7IHh7IHh7IHh7IHh7IHh4='

test('shots are moved and removed by keyboard and by pointer, and typed', async ({ page }) => {
  await openExample(page, 'Drawings with made-up words')
  const texts = page.getByRole('textbox', { name: /^Text of shot/ })
  await page.getByRole('button', { name: 'Move shot 1 later' }).focus()
  await page.keyboard.press('Enter')
  await expect(texts.nth(1)).toHaveValue('dax')
  await expect(page.getByRole('button', { name: 'Move shot 2 later' })).toBeFocused()
  await page.getByRole('img', { name: 'noto-bicycle.png' }).dragTo(page.getByRole('img', { name: 'noto-banana.png' }))
  await expect(texts.nth(2)).toHaveValue('wug')
  await page.getByRole('button', { name: 'Remove shot 1' }).focus()
  await page.keyboard.press('Enter')
  await expect(texts).toHaveCount(2)
  await expect(texts.first()).toHaveValue('blicket')
  await texts.nth(1).fill('')
  await expect(page.getByText('Type the text of shot 2.')).toBeVisible()
  await texts.nth(1).fill('toma')
  await expect(answer(page)).toHaveText('toma')
})

test('the copied request is answered when it is pasted into a shell', async ({ page, context }) => {
  await context.grantPermissions(['clipboard-read', 'clipboard-write'])
  await openExample(page, 'Drawings with made-up words')
  await page.getByRole('button', { name: 'Copy' }).click()
  await expect(page.getByText('Copied')).toBeVisible()
  const command = await page.evaluate(() => navigator.clipboard.readText())
  const reply = JSON.parse(
    execFileSync('sh', ['-c', command], { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] }),
  )
  expect(reply.choices[0].text.trim()).toBe('wug')

  await page.getByRole('button', { name: 'Python' }).click()
  expect(runPython(await page.locator('pre').innerText())).toBe('wug')
  await page.getByRole('button', { name: 'Choose', exact: true }).click()
  await expect(page.locator('pre')).toContainText('client.classify')
  expect(runPython(await page.locator('pre').innerText())).toMatch(/^wug \{/)
})

function runPython(program: string): string {
  const python = process.env.PYTHON ?? '../../.venv/bin/python'
  const env = { ...process.env, PYTHONPATH: resolve('../python/src') }
  return execFileSync(python, ['-c', program], { encoding: 'utf8', env }).trim()
}

test('the key is used and never shown', async ({ page }) => {
  await page.addInitScript(() => sessionStorage.setItem('flamboyance-api-key', 'very secret'))
  const asked = page.waitForRequest('**/v1/completions')
  await openExample(page, 'Drawings with made-up words')
  expect((await asked).headers()['authorization']).toBe('Bearer very secret')
  await expect(page.locator('pre')).toContainText('-H "Authorization: Bearer $FLAMBOYANCE_API_KEY"')
  await page.getByRole('button', { name: 'Python' }).click()
  await expect(page.locator('pre')).toContainText('os.environ["FLAMBOYANCE_API_KEY"]')
  await expect(page.locator('body')).not.toContainText('very secret')
})

test('what was done with a key ends with the tab', async ({ page, context }) => {
  await page.addInitScript(() => sessionStorage.setItem('flamboyance-api-key', 'very secret'))
  await openExample(page, 'Drawings with made-up words')
  await page.waitForTimeout(600)
  await page.reload()
  await expect(page.getByRole('textbox', { name: 'Text of shot 1' })).toHaveValue('dax')
  const other = await context.newPage()
  await other.goto('/')
  await expect(other.getByText('Add a picture to ask about.')).toBeVisible()
  await expect(other.getByRole('textbox', { name: 'Text of shot 1' })).toHaveCount(0)
})

test('a picture that is gone from the server shows as missing and can be removed', async ({ page, request }) => {
  const pixel = join(mkdtempSync(join(tmpdir(), 'gone-')), 'gone.bmp')
  writeFileSync(pixel, bitmap(12, 34, 56))
  await page.goto('/')
  await page.getByTestId('files').first().setInputFiles(pixel)
  await page.getByRole('textbox', { name: 'Text of shot 1' }).fill('dot')
  await page.waitForTimeout(600)
  // the same bytes have the same id
  const { id } = await (await request.post('/v1/images', { data: readFileSync(pixel) })).json()
  await request.delete(`/v1/images/${id}`)
  await page.reload()
  await expect(page.getByText('No longer on the server')).toBeVisible()
  await page.getByRole('button', { name: 'Remove shot 1' }).click()
  await expect(page.getByRole('textbox', { name: 'Text of shot 1' })).toHaveCount(0)
})

test('a picture that leaves the server while it is asked about shows as missing', async ({ page, request }) => {
  const picture = { name: 'leaving.bmp', mimeType: 'image/bmp', buffer: bitmap(65, 43, 21) }
  await page.goto('/')
  await page.getByTestId('files').first().setInputFiles(picture)
  await page.getByRole('textbox', { name: 'Text of shot 1' }).fill('dot')
  await page.getByTestId('files').last().setInputFiles(picture)
  await expect(answer(page)).not.toBeEmpty()
  await page.waitForTimeout(600)
  await page.reload() // after it, the page has the picture no more
  await expect(answer(page)).not.toBeEmpty()
  const { id } = await (await request.post('/v1/images', { data: picture.buffer })).json()
  await request.delete(`/v1/images/${id}`)
  await page.getByRole('textbox', { name: 'Text of shot 1' }).fill('point')
  await expect(page.getByText('No longer on the server', { exact: true })).toBeVisible()
  await expect(page.getByText('The picture to ask about is no longer on the server. Remove it.')).toBeVisible()
})

/** A bitmap of one pixel. */
function bitmap(red: number, green: number, blue: number): Buffer {
  const file = Buffer.alloc(58)
  file.write('BM')
  for (const [at, value] of [
    [2, 58],
    [10, 54],
    [14, 40],
    [18, 1],
    [22, 1],
    [34, 4],
  ] as const)
    file.writeUInt32LE(value, at)
  file.writeUInt16LE(1, 26)
  file.writeUInt16LE(24, 28)
  file.set([blue, green, red], 54)
  return file
}

test('a file that is no picture is refused by its name, and the others are taken', async ({ page }) => {
  await page.goto('/')
  await page
    .getByTestId('files')
    .first()
    .setInputFiles([
      { name: 'notes.png', mimeType: 'image/png', buffer: Buffer.from('no picture') },
      { name: 'drawing.bmp', mimeType: 'image/bmp', buffer: bitmap(1, 2, 3) },
    ])
  await expect(page.getByRole('alert')).toContainText('notes.png')
  await expect(page.getByRole('textbox', { name: 'Text of shot 1' })).toBeVisible()
})

for (const colorScheme of ['light', 'dark'] as const) {
  test(`axe finds nothing serious, ${colorScheme}`, async ({ page }) => {
    await page.emulateMedia({ colorScheme })
    await openExample(page, 'Drawings with made-up words')
    const { violations } = await new AxeBuilder({ page }).analyze()
    expect(violations.filter(({ impact }) => impact === 'serious' || impact === 'critical')).toEqual([])
  })
}

test('nothing is wider than a narrow screen, and the console is silent', async ({ page }) => {
  const messages: string[] = []
  page.on('console', (message) => messages.push(message.text()))
  page.on('pageerror', (error) => messages.push(error.message))
  await page.setViewportSize({ width: 360, height: 740 })
  await openExample(page, 'Drawings with made-up words')
  expect(await page.evaluate(() => document.documentElement.scrollWidth)).toBeLessThanOrEqual(360)
  expect(messages).toEqual([])
})
