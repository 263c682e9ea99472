// The server's state, live.
import { expect, test } from '@playwright/test'

test('the view says what the server runs on', async ({ page, request }) => {
  const { version, engine } = await (await request.get('/version')).json()
  await page.goto('/#/server')
  // the head of the page says it, too
  await expect(page.locator('p').and(page.getByText('ready', { exact: true }))).toBeVisible()
  const facts = page.getByRole('region', { name: 'flamboyance-lite' })
  await expect(facts).toContainText(version)
  for (const fact of [engine.device, engine.dtype, engine.backend.backend]) await expect(facts).toContainText(fact)
  await expect(page.getByRole('meter', { name: /pinned/ })).toHaveAttribute(
    'aria-valuemax',
    String(engine.num_media_slots),
  )
})

test('requests show in the charts and in the hit rate of the cache', async ({ page, request }) => {
  await page.goto('/#/server')
  const finished = page.getByText(/Since the start: /)
  const count = async () => Number(/(\d+) requests finished/.exec((await finished.textContent()) ?? '')?.[1])
  const before = await count()
  const ask = () => request.post('/v1/completions', { data: { prompt: 'One, two, three, four, five,', max_tokens: 8 } })
  for (let number = 0; number < 2; number += 1) expect((await ask()).ok()).toBe(true)

  await expect.poll(count).toBe(before + 2)
  const tokens = page.locator('figure', { hasText: 'prompt, computed' })
  await expect(tokens.getByRole('img')).toHaveAccessibleName(/Tokens over the last 120 seconds, from 0 to [1-9]/)
  await expect(page.getByText(/% since the start, \d+% in the last two minutes/).first()).toBeVisible()
  await expect(page.getByText('First token, mean').locator('xpath=..')).toContainText(/\d m?s/)
})

test('metrics that are not permitted are explained, and the rest stays', async ({ page }) => {
  await page.route('/metrics', (route) => route.fulfill({ status: 403, body: 'forbidden' }))
  await page.goto('/#/server')
  await expect(page.getByRole('alert')).toHaveText(
    'You are not permitted to read /metrics here, so there is no live data.',
  )
  await expect(page.getByRole('region', { name: 'flamboyance-lite' })).toBeVisible()
})

test('a server that is not ready says why', async ({ page }) => {
  await page.route('/health', async (route) => {
    const response = await route.fetch()
    await route.fulfill({ status: 503, json: { ...(await response.json()), status: 'shutting_down' } })
  })
  await page.goto('/#/server')
  await expect(page.getByText('shutting down', { exact: true })).toBeVisible()
})
