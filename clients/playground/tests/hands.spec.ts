// The page by other hands than a mouse's and a file dialog's: a folder dropped from the desktop, and a finger.
import { expect, test, type Locator, type Page } from '@playwright/test'
import { resolve } from 'node:path'

const TEXTURES = resolve('../../docs/examples/textures/shots')

/** Drops files or folders as the desktop does: the browser reads them itself, folders included. */
async function drop(page: Page, target: Locator, paths: string[]) {
  const box = (await target.boundingBox())!
  const at = { x: box.x + box.width / 2, y: box.y + 12 }
  const session = await page.context().newCDPSession(page)
  for (const type of ['dragEnter', 'dragOver', 'drop'] as const)
    await session.send('Input.dispatchDragEvent', {
      type,
      ...at,
      data: { items: [], files: paths, dragOperationsMask: 1 },
    })
}

test('a folder of labelled folders, dropped on Try, becomes shots with their labels', async ({ page }) => {
  await page.goto('/')
  const zone = page.getByRole('group', { name: /^Drop .*folder/ }).first()
  await zone.scrollIntoViewIfNeeded()
  await drop(page, zone, [TEXTURES])
  const texts = page.getByRole('textbox', { name: /^Text of shot/ })
  await expect(texts).toHaveCount(6)
  const labels = await texts.evaluateAll((inputs) => inputs.map((input) => (input as HTMLInputElement).value))
  expect(labels.sort()).toEqual(['brick', 'brick', 'grass', 'grass', 'gravel', 'gravel'])
})

test('a file that is dropped beside the zone does not replace the page', async ({ page }) => {
  await page.goto('/')
  const heading = page.getByRole('heading', { name: 'Try', exact: true })
  const isPrevented = (target: Element, type: string) =>
    !target.dispatchEvent(new DragEvent(type, { bubbles: true, cancelable: true }))
  expect(await heading.evaluate(isPrevented, 'dragover')).toBe(true)
  expect(await heading.evaluate(isPrevented, 'drop')).toBe(true)
})

test.describe('by touch', () => {
  test.use({ hasTouch: true, isMobile: true, viewport: { width: 390, height: 844 } })

  test('an example, another query, and Look inside', async ({ page }) => {
    await page.goto('/')
    await page.getByRole('button', { name: 'Drawings with made-up words' }).tap()
    const play = page.getByRole('button', { name: /^Ask with 0 to/ })
    await expect(play).toBeEnabled()
    await page.getByRole('button', { name: 'Ask about fluent-banana.png' }).tap()
    await expect(page.getByText('This is a blicket')).toBeVisible()
    await page.getByRole('link', { name: 'Look inside' }).tap()
    await expect(page.getByRole('img', { name: /tokens by .* pictures/ })).toBeVisible()
  })
})
