// Every view as the documentation shows it, with the examples of docs/examples.
import { test, expect, type Page } from '@playwright/test'
import { resolve } from 'node:path'

const IMAGES = resolve('../../docs/images')
const TEXTURES = resolve('../../docs/examples/textures')

/** Takes a whole page, in a window as high as the page: thumbnails load only in view. */
async function take(page: Page, name: string) {
  const window = page.viewportSize()!
  const height = await page.evaluate(() => document.documentElement.scrollHeight)
  await page.setViewportSize({ ...window, height })
  await page.waitForTimeout(1500)
  await page.screenshot({ path: `${IMAGES}/${name}.png`, fullPage: true })
  await page.setViewportSize(window)
}

/** Takes the top of a page, as high as the window. */
const takeTop = (page: Page, name: string) => page.screenshot({ path: `${IMAGES}/${name}.png` })

async function openDrawings(page: Page) {
  await page.goto('/')
  await page.getByRole('button', { name: 'Drawings with made-up words' }).click()
  await expect(page.getByRole('button', { name: /^Ask with 0 to/ })).toBeEnabled()
}

test.describe.configure({ mode: 'serial' })

test('try', async ({ page }) => {
  await page.setViewportSize({ width: 1280, height: 1300 })
  await openDrawings(page)
  await page.getByRole('button', { name: /fluent-banana/ }).click()
  await expect(page.getByRole('button', { name: /^Ask with 0 to/ })).toBeEnabled()
  await page.getByRole('button', { name: /^Ask with 0 to/ }).click()
  await expect(page.getByRole('button', { name: /^Ask with 0 to/ })).toBeEnabled()
  await takeTop(page, 'try')
})

test('try, dark and narrow', async ({ page }) => {
  await page.emulateMedia({ colorScheme: 'dark' })
  await page.setViewportSize({ width: 390, height: 844 })
  await openDrawings(page)
  await take(page, 'try-narrow-dark')
})

test('look inside', async ({ page }) => {
  await openDrawings(page)
  await page.getByRole('link', { name: 'Look inside' }).click()
  await expect(page.getByRole('img', { name: /tokens by .* pictures/ })).toBeVisible()
  await expect(page.getByRole('heading', { name: 'How far the layers are open to pictures' })).toBeVisible()
  await page.waitForTimeout(1500)
  await take(page, 'inside')
})

test('support sets', async ({ page }) => {
  await page.goto('/#/sets')
  await page.getByTestId('folder').setInputFiles(`${TEXTURES}/shots`)
  await page.getByLabel('Name').fill('textures')
  await page.getByRole('button', { name: 'Create set' }).click()
  await expect(page.getByRole('heading', { level: 1 })).toHaveText('textures')
  await page.waitForTimeout(1500)
  await take(page, 'set')
  await page.getByRole('link', { name: 'Evaluate' }).click()
  await page.getByRole('button', { name: 'Evaluate', exact: true }).click()
  await expect(page.getByRole('link', { name: 'Apply recommendation' })).toBeVisible({ timeout: 200_000 })
  const setting = page.getByLabel('Setting in detail')
  const withMistakes = setting.locator('option', { hasText: /^In context.*: [5-9]\d%/ }).first()
  await setting.selectOption((await withMistakes.getAttribute('value'))!)
  await page.waitForTimeout(1500)
  await take(page, 'evaluation')
  await page.getByRole('link', { name: 'Apply recommendation' }).click()
  await page.getByTestId('files').setInputFiles(`${TEXTURES}/queries/gravel/3.jpg`)
  await expect(page.getByTestId('label')).toHaveText('gravel')
  await page.waitForTimeout(500)
  await take(page, 'use')
})

test('server', async ({ page, request }) => {
  await page.goto('/#/server')
  for (let number = 0; number < 12; number++) {
    await request.post('/v1/completions', { data: { prompt: `${number} flamingos are`, max_tokens: 24 } })
  }
  await page.waitForTimeout(2500)
  await take(page, 'server')
})
