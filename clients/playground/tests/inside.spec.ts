// Look inside: the tokens and the mask, attention over the picture, gates, and the number of visual tokens.
import AxeBuilder from '@axe-core/playwright'
import { expect, test, type Page } from '@playwright/test'
import { resolve } from 'node:path'

const EXAMPLES = resolve('public/examples')
const tokens = (page: Page) => page.getByRole('toolbar', { name: 'Tokens of prompt and answer' }).getByRole('button')
const matrix = (page: Page) => page.getByRole('img', { name: /tokens by .* pictures/ })
const readCells = async (page: Page) =>
  Number(/: (\d+) cells/.exec((await matrix(page).getAttribute('aria-label'))!)![1])

async function openInside(page: Page, title = 'Drawings with made-up words') {
  await page.goto('/#/inside')
  await page.getByRole('button', { name: title }).click()
  await expect(matrix(page)).toBeVisible()
}

test('each token reads the last picture, and the ablation reads all', async ({ page }) => {
  await openInside(page)
  await expect(tokens(page).first()).toHaveAccessibleName('image, reads picture 1')
  await expect(tokens(page).last()).toHaveAccessibleName(/reads picture 4$/)
  const count = await tokens(page).count()
  expect(await readCells(page)).toBe(count) // one picture per token
  const before = await Promise.all(
    (await tokens(page).all()).map(async (token) => Number(/\d+$/.exec((await token.getAttribute('aria-label'))!)![0])),
  )
  await page.getByRole('button', { name: 'All previous pictures' }).click()
  expect(await readCells(page)).toBe(before.reduce((sum, pictures) => sum + pictures, 0))
  await expect(page.getByText('an ablation of the Flamingo paper')).toBeVisible()
})

test('attention goes to the picture of the chosen token, by click and by arrow keys', async ({ page }) => {
  await openInside(page)
  await expect(page.getByRole('img', { name: /^fluent-bicycle.png: of 7 by 7 patches/ })).toBeVisible()
  await expect(page.getByRole('img', { name: /^64 visual tokens/ }).first()).toBeVisible()
  const answered = page.waitForResponse((response) => response.request().postDataJSON()?.token === 2)
  await tokens(page).nth(2).click()
  expect((await (await answered).json()).token).toBe(2)
  await expect(page.getByRole('img', { name: /^noto-elephant.png: of/ })).toBeVisible()
  await page.keyboard.press('ArrowRight')
  await expect(tokens(page).nth(3)).toBeFocused()
  await expect(tokens(page).nth(3)).toHaveAttribute('aria-pressed', 'true')
  const byLayer = page.waitForRequest((request) => request.postDataJSON()?.layers?.length === 1)
  await page.getByRole('combobox', { name: 'Layer' }).selectOption({ index: 1 })
  await byLayer
  await expect(page.locator('.running')).toHaveCount(0)
})

test('the heat is drawn as strong as the shares of the server', async ({ page }) => {
  // the card of the resampler inspects pictures of its own, without an answer
  const replied = page.waitForResponse((response) => response.request().postDataJSON()?.answer !== undefined)
  await openInside(page)
  const { attention } = await (await replied).json()
  const [grid] = attention[0].grid as number[][][]
  const shares = grid!.flat()
  const bright = await page
    .locator('canvas')
    .first()
    .evaluate((canvas: HTMLCanvasElement) => {
      const { data } = canvas.getContext('2d')!.getImageData(0, 0, canvas.width, canvas.height)
      return Array.from({ length: canvas.width * canvas.height }, (_, index) => data[index * 4 + 1]!)
    })
  expect(bright).toHaveLength(shares.length)
  // A canvas rounds colours after it multiplies them by the opacity: each is at most 1.4 levels off.
  const byShare = bright.map((_, index) => index).sort((one, other) => shares[one]! - shares[other]!)
  byShare.forEach((cell, rank) => {
    const dimmest = Math.min(...byShare.slice(rank).map((brighter) => bright[brighter]!))
    expect(bright[cell]! - dimmest).toBeLessThanOrEqual(2)
  })
  expect(bright[byShare.at(-1)!]! - bright[byShare[0]!]!).toBeGreaterThan(150)
})

for (const [resize, fit, ratio] of [
  ['squash', 'fill', 3],
  ['crop', 'cover', 1],
  ['pad', 'contain', 1],
] as const) {
  test(`the heat lies on what the encoder reads of a wide picture: ${resize}`, async ({ page }) => {
    await page.route('/v1/models', async (route) => {
      const models = await (await route.fetch()).json()
      models.data[0].vision.resize = resize
      await route.fulfill({ json: models })
    })
    await page.goto('/')
    await page
      .getByTestId('files')
      .last()
      .setInputFiles({ name: 'wide.png', mimeType: 'image/png', buffer: await wide(page) })
    await page.getByRole('link', { name: 'Look inside' }).click()
    const picture = page.getByRole('img', { name: /^wide.png: of \d+ by \d+ patches/ })
    await expect(picture.locator('img')).toHaveCSS('object-fit', fit)
    await expect
      .poll(async () => ((box) => box && box.width / box.height)(await picture.boundingBox()))
      .toBeCloseTo(ratio, 1)
  })
}

/** Draws a picture that is three times as wide as high. */
async function wide(page: Page): Promise<Buffer> {
  const url = await page.evaluate(() => {
    const canvas = Object.assign(document.createElement('canvas'), { width: 96, height: 32 })
    canvas.getContext('2d')!.fillRect(10, 10, 20, 12)
    return canvas.toDataURL()
  })
  return Buffer.from(url.split(',')[1]!, 'base64')
}

test('gates are shown by layer', async ({ page }) => {
  await openInside(page)
  const rows = page.getByRole('table', { name: 'The tanh of the gates by layer' }).getByRole('row')
  const layers = await page.getByRole('combobox', { name: 'Layer' }).getByRole('option').count()
  await expect(rows).toHaveCount(layers) // the table's head, and "mean of all" of the list
})

test('a video and pictures of other sizes have 64 visual tokens too', async ({ page }) => {
  await openInside(page, 'A video')
  await expect(page.getByRole('img', { name: /^Second \d of fluent-bicycle.mp4/ })).toHaveCount(4)
  await page.getByTestId('files').setInputFiles(resolve(EXAMPLES, 'brick-1.jpg'))
  const cards = page.locator('section', { hasText: 'whatever the picture' }).getByRole('listitem')
  await expect(cards).toHaveCount(3)
  for (const text of ['256 × 256', '224 × 224 × 4 frames', '224 × 224']) {
    await expect(cards.filter({ hasText: text }).first()).toContainText('64 visual tokens')
  }
  await page.reload()
  await expect(cards.filter({ hasText: '256 × 256' })).toBeVisible()
})

test('without a query, the view says what to do', async ({ page }) => {
  await page.goto('/#/inside')
  await expect(page.getByText('There is nothing to look into yet.')).toBeVisible()
})

for (const colorScheme of ['light', 'dark'] as const) {
  test(`axe finds nothing serious, ${colorScheme}`, async ({ page }) => {
    await page.emulateMedia({ colorScheme })
    await openInside(page)
    await expect(page.getByText('64 visual tokens').first()).toBeVisible()
    const { violations } = await new AxeBuilder({ page }).analyze()
    expect(violations.filter(({ impact }) => impact === 'serious' || impact === 'critical')).toEqual([])
  })
}

test('nothing is wider than a narrow screen, and the console is silent', async ({ page }) => {
  const messages: string[] = []
  page.on('console', (message) => messages.push(message.text()))
  page.on('pageerror', (error) => messages.push(error.message))
  await page.setViewportSize({ width: 360, height: 740 })
  await openInside(page, 'A video')
  expect(await page.evaluate(() => document.documentElement.scrollWidth)).toBeLessThanOrEqual(360)
  expect(messages).toEqual([])
})
