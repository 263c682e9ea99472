// What all views share: keyboard, theme, key, accessibility, narrow screens, the first view, and the policy of the page.
import AxeBuilder from '@axe-core/playwright'
import { expect, test, type Page } from '@playwright/test'
import { spawn, type ChildProcess } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

const VIEWS = { Try: '#/try', 'Look inside': '#/inside', 'Support sets': '#/sets', Server: '#/server' }
const KEY_PORT = 1 + Number(process.env.PLAYGROUND_PORT ?? '18090')

const heading = (page: Page) => page.getByRole('heading', { level: 1 })

test('the views are reached by the keyboard alone', async ({ page }) => {
  await page.goto('/')
  await expect(heading(page)).toBeVisible()
  await page.keyboard.press('Tab')
  await expect(page.getByRole('link', { name: 'Skip to content' })).toBeFocused()
  for (const name of ['Flamboyance', ...Object.keys(VIEWS)]) {
    await page.keyboard.press('Tab')
    await expect(page.getByRole('link', { name, exact: true })).toBeFocused()
  }
  await page.keyboard.press('Enter')
  await expect(page).toHaveTitle('Server · Flamboyance')
  await expect(page.getByRole('link', { name: 'Server', exact: true })).toHaveAttribute('aria-current', 'page')
})

test('the focus stays where the element that had it is removed', async ({ page, request }) => {
  const name = 'focused'
  const example = (id: string, label: string) => ({ id, label })
  await request.post('/v1/support_sets', { data: { name, examples: [example('one', 'a'), example('two', 'b')] } })
  await page.goto('/#/sets')
  const section = page.getByRole('region', { name: 'New set' })
  await page.getByRole('button', { name: 'Empty set' }).press('Enter')
  await expect(section).toBeFocused()
  await page.keyboard.press('Tab')
  await expect(page.getByLabel('Name')).toBeFocused()
  await page.getByRole('button', { name: 'Cancel' }).press('Enter')
  await expect(section).toBeFocused()

  // a link in the view leads to another one
  await page.getByRole('link', { name, exact: true }).press('Enter')
  await expect(heading(page)).toHaveText(name)
  await expect(page.getByRole('main')).toBeFocused()

  // an example that gets another label is in another place
  const edit = page.getByRole('button', { name: 'Edit a one' })
  await edit.press('Enter')
  await page.keyboard.press('Escape')
  await expect(edit).toBeFocused()
  await edit.press('Enter')
  await page.getByRole('combobox', { name: 'Label', exact: true }).fill('b')
  await page.keyboard.press('Enter')
  await expect(page.getByRole('button', { name: 'Edit b one' })).toBeFocused()
  await request.delete(`/v1/support_sets/${name}`)
})

test('an example whose dialog was just closed is edited again', async ({ page, request }) => {
  const name = 'edited-again'
  await request.post('/v1/support_sets', { data: { name, examples: [{ id: 'one', label: 'a' }] } })
  await page.goto('/#/sets')
  await page.getByRole('link', { name, exact: true }).click()
  await page.getByRole('button', { name: 'Edit a one' }).click()
  // before the browser reports that the dialog was closed
  await page.evaluate(() => {
    document.querySelector<HTMLDialogElement>('dialog[open][aria-labelledby="edit-title"]')!.close()
    document.querySelector<HTMLElement>('[data-edit="one"]')!.click()
  })
  await expect(page.getByRole('heading', { name: 'Edit the example' })).toBeVisible()
  await page.waitForTimeout(300)
  await expect(page.getByRole('heading', { name: 'Edit the example' })).toBeVisible()
  await request.delete(`/v1/support_sets/${name}`)
})

test('the focus stays where an action disables what has it while it runs', async ({ page, request }) => {
  await page.goto('/')
  const example = page.getByRole('button', { name: 'Drawings with made-up words' })
  await example.press('Enter')
  await expect(page.getByRole('textbox', { name: 'Text of shot 3' })).toHaveValue('blicket')
  await expect(example).toBeFocused()

  // it is gone when the action has ended
  await page.goto('/#/sets')
  await page.getByRole('button', { name: 'Empty set' }).click()
  await page.getByLabel('Name').fill('disabled')
  await page.keyboard.press('Enter')
  await expect(heading(page)).toHaveText('disabled')
  await expect(page.getByRole('main')).toBeFocused()
  await request.delete('/v1/support_sets/disabled')
})

test('the focus does not come back to a button when the person has gone on', async ({ page }) => {
  await page.goto('/')
  const example = page.getByRole('button', { name: 'Drawings with made-up words' })
  const last = page.getByRole('textbox', { name: 'Text of shot 3' })
  const click = () => page.getByRole('banner').getByRole('status').click()
  for (const goOn of [click, () => page.keyboard.press('PageDown')]) {
    let release = () => {}
    const held = new Promise<void>((resolve) => (release = resolve))
    await page.route('/v1/images', async (route) => {
      await held
      await route.continue()
    })
    await example.press('Enter')
    await expect(example).toBeDisabled()
    await expect(page.locator('body')).toBeFocused()
    await goOn()
    release()
    await expect(last).toHaveValue('blicket')
    await expect(example).toBeEnabled()
    await expect(page.locator('body')).toBeFocused()
    await page.unroute('/v1/images')
    await page.getByRole('button', { name: 'Clear', exact: true }).click()
  }
})

test('a screen reader hears what is missing before the model can be asked', async ({ page }) => {
  await page.goto('/')
  await expect(page.getByRole('status').filter({ hasText: 'Add a picture to ask about.' })).toBeVisible()
})

test('the link of the shown view is in view on a phone', async ({ page }) => {
  await page.setViewportSize({ width: 320, height: 640 })
  for (const [name, address] of Object.entries(VIEWS)) {
    await page.goto(`/${address}`)
    await expect(page.getByRole('banner').getByRole('link', { name, exact: true })).toBeInViewport({ ratio: 0.98 })
  }
})

test('another part of a set does not scroll the page to its tabs', async ({ page, request }) => {
  const examples = Array.from({ length: 40 }, (_, at) => ({ id: `e${at}`, label: `label ${at}` }))
  await request.post('/v1/support_sets', { data: { name: 'scrolled', examples } })
  await page.setViewportSize({ width: 320, height: 400 })
  await page.goto('/#/sets/scrolled/evaluations')
  await expect(page.getByRole('heading', { name: 'Evaluate version 1' })).toBeVisible()
  await page.evaluate('scrollTo(0, 500)')
  await page.evaluate("location.hash = '#/sets/scrolled/examples'")
  await expect(page.getByRole('button', { name: 'Edit label 0 e0' })).toBeAttached()
  await expect(page.getByRole('link', { name: 'Examples', exact: true })).not.toBeInViewport()
  await request.delete('/v1/support_sets/scrolled')
})

test('the theme is chosen, and stays after a reload', async ({ page }) => {
  const background = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor)
  await page.emulateMedia({ colorScheme: 'light' })
  await page.goto('/')
  const light = await background()
  await page.emulateMedia({ colorScheme: 'dark' })
  const dark = await background()
  expect(dark).not.toBe(light)

  await page.getByRole('button', { name: 'Theme: system' }).click()
  expect(await background()).toBe(light)
  await page.getByRole('button', { name: 'Theme: light' }).click()
  await page.emulateMedia({ colorScheme: 'light' })
  expect(await background()).toBe(dark)
  await page.reload()
  await expect(page.getByRole('button', { name: 'Theme: dark' })).toBeVisible()
  expect(await background()).toBe(dark)
})

for (const [name, address] of Object.entries(VIEWS)) {
  for (const colorScheme of ['light', 'dark'] as const) {
    test(`axe finds nothing serious in ${name}, ${colorScheme}`, async ({ page }) => {
      await page.emulateMedia({ colorScheme })
      await page.goto(`/${address}`)
      await expect(heading(page)).toBeVisible()
      const { violations } = await new AxeBuilder({ page }).analyze()
      const grave = violations.filter(({ impact }) => impact === 'serious' || impact === 'critical')
      expect(grave.map(({ id, nodes }) => `${id}: ${nodes.map(({ html }) => html).join(' ')}`)).toEqual([])
    })
  }

  test(`${name} fits a narrow screen`, async ({ page }) => {
    await page.setViewportSize({ width: 320, height: 640 })
    await page.goto(`/${address}`)
    await expect(heading(page)).toBeVisible()
    await page.waitForLoadState('networkidle')
    const excess = await page.evaluate(
      () => document.documentElement.scrollWidth - document.documentElement.clientWidth,
    )
    expect(excess).toBeLessThanOrEqual(0)
  })
}

// axe does not judge a number of one digit
for (const colorScheme of ['light', 'dark'] as const) {
  test(`the numbers of a filter can be read, ${colorScheme}`, async ({ page, request }) => {
    const name = `counted-${colorScheme}`
    const examples = Array.from({ length: 12 }, (_, index) => ({ id: `e${index}`, label: 'twelve' }))
    await request.post('/v1/support_sets', { data: { name, examples } })
    await page.emulateMedia({ colorScheme })
    await page.goto(`/#/sets/${name}`)
    await expect(page.getByRole('button', { name: 'All 12' })).toBeVisible()
    const { violations } = await new AxeBuilder({ page }).withRules('color-contrast').analyze()
    expect(violations.flatMap(({ nodes }) => nodes.map(({ html }) => html))).toEqual([])
    await request.delete(`/v1/support_sets/${name}`)
  })
}

test('the head of the page tells a screen reader whether the server is ready', async ({ page }) => {
  const state = page.getByRole('banner').getByRole('status')
  await page.goto('/')
  await expect(state).toHaveText(/The server is ready:\s+flamboyance-lite$/)
  await page.route('/health/ready', (route) => route.fulfill({ status: 503, json: { status: 'shutting_down' } }))
  await expect(state).toHaveText(/The server is not ready:\s+shutting down$/)
})

test('the head of the page has two rows on a phone', async ({ page }) => {
  await page.setViewportSize({ width: 360, height: 640 })
  await page.goto('/')
  await expect(page.locator('.dot.ready')).toBeVisible()
  const middle = async (name: string) => {
    const box = (await page.getByRole('banner').getByText(name).or(page.getByLabel(name)).first().boundingBox())!
    return box.y + box.height / 2
  }
  const row = await middle('Flamboyance')
  for (const name of ['API', 'Theme: system']) expect(Math.abs((await middle(name)) - row)).toBeLessThan(6)
})

test('the first view is there within a second', async ({ page }) => {
  await page.goto('/')
  await expect(heading(page)).toBeVisible()
  const paint = await page.evaluate(async () => {
    const observer = new Promise<number>((resolve) => {
      new PerformanceObserver((list) => resolve(list.getEntries().at(-1)!.startTime)).observe({
        type: 'largest-contentful-paint',
        buffered: true,
      })
    })
    const [navigation] = performance.getEntriesByType('navigation') as PerformanceNavigationTiming[]
    return Math.max(await observer, navigation!.loadEventEnd)
  })
  expect(paint).toBeGreaterThan(0)
  expect(paint).toBeLessThan(1000)
})

test('no view asks another host or breaks the policy of the page', async ({ page, baseURL }) => {
  const foreign: string[] = []
  const complaints: string[] = []
  page.on('request', (request) => {
    const url = request.url()
    if (!url.startsWith(baseURL!) && !url.startsWith('blob:')) foreign.push(url)
  })
  page.on('console', (message) => {
    if (message.type() === 'error') complaints.push(message.text())
  })
  page.on('pageerror', (error) => complaints.push(error.message))
  for (const address of Object.values(VIEWS)) {
    await page.goto(`/${address}`)
    await expect(heading(page)).toBeVisible()
    await page.waitForLoadState('networkidle')
  }
  expect(foreign).toEqual([])
  expect(complaints).toEqual([])
})

test('a key that no header can hold is refused where it is typed', async ({ page }) => {
  await page.addInitScript("sessionStorage.setItem('flamboyance-api-key', 'old')")
  await page.goto('/')
  await page.getByRole('button', { name: 'Key', exact: true }).click()
  const dialog = page.getByRole('dialog')
  await dialog.getByLabel('API key').fill('ключ')
  await dialog.getByRole('button', { name: 'Continue' }).click()
  await expect(dialog.locator('input:invalid')).toBeFocused()
  expect(await page.evaluate("sessionStorage.getItem('flamboyance-api-key')")).toBe('old')
})

test.describe('a server with a key', () => {
  let server: ChildProcess
  const folder = mkdtempSync(join(tmpdir(), 'playground-key-'))
  const address = `http://127.0.0.1:${KEY_PORT}`

  test.beforeAll(async () => {
    test.setTimeout(300_000) // as long as the configuration gives the first server to start
    const python = (process.env.PYTHON ?? '.venv/bin/python').replace('../../', '')
    const flags = ['-m', 'server', '--port', String(KEY_PORT), '--data-dir', folder]
    // a flag would show the key to every user of the machine
    const env = { ...process.env, FLAMBOYANCE_API_KEY: 'let-me-in' }
    server = spawn(python, flags, { cwd: '../..', env, stdio: 'ignore' })
    const isReady = async () => (await fetch(`${address}/health/ready`).catch(() => null))?.ok ?? false
    await expect.poll(isReady, { timeout: 290_000, intervals: [1000] }).toBe(true)
  })

  test.afterAll(async () => {
    const end = new Promise((resolve) => server.once('exit', resolve))
    server.kill('SIGTERM')
    await end
    rmSync(folder, { recursive: true, force: true })
  })

  test('the page asks for the key, and keeps it until the tab is closed', async ({ page, context }) => {
    await page.goto(`${address}/#/sets`)
    const dialog = page.getByRole('dialog', { name: /^This server (needs a|refused the) key$/ })
    await expect(dialog).toHaveAccessibleName('This server needs a key')
    await dialog.getByLabel('API key').fill('wrong')
    await dialog.getByRole('button', { name: 'Continue' }).click()
    await expect(dialog).toHaveAccessibleName('This server refused the key')
    await dialog.getByLabel('API key').fill('let-me-in')
    await page.keyboard.press('Enter')
    await expect(page.getByText('There is no support set yet.')).toBeVisible()
    await page.reload()
    await expect(page.getByText('There is no support set yet.')).toBeVisible()
    await expect(dialog).toBeHidden()

    const other = await context.newPage()
    let asked = 0
    other.on('request', (sent) => (asked += Number(sent.url().endsWith('/v1/models'))))
    await other.goto(`${address}/#/sets`)
    await expect(other.getByRole('dialog', { name: 'This server needs a key' })).toBeVisible()
    await other.waitForTimeout(2500)
    expect(asked).toBe(1) // it waits for the key
  })

  test('a key that is revoked during an edit is asked for above its dialog, each time', async ({ page, request }) => {
    const headers = { Authorization: 'Bearer let-me-in' }
    const name = 'revoked'
    await request.post(`${address}/v1/support_sets`, { headers, data: { name, examples: [{ id: 'one', label: 'a' }] } })
    const { key, id } = await (
      await request.post(`${address}/v1/keys`, { headers, data: { name, role: 'manage' } })
    ).json()
    await page.goto(`${address}/#/sets/${name}`)
    const asking = page.getByRole('dialog', { name: /key$/ })
    await asking.getByLabel('API key').fill(key)
    await page.keyboard.press('Enter')
    await page.getByRole('button', { name: 'Edit a one' }).click()
    await request.delete(`${address}/v1/keys/${id}`, { headers })
    for (const text of ['b', 'c']) {
      await page.getByRole('combobox', { name: 'Label', exact: true }).fill(text)
      await page.keyboard.press('Enter')
      await expect(asking).toHaveAccessibleName('This server refused the key')
      await expect(asking.getByLabel('API key')).toBeFocused()
      await page.keyboard.press('Escape')
      await expect(page.getByRole('dialog', { name: 'Edit the example' })).toBeVisible()
    }
    await request.delete(`${address}/v1/support_sets/${name}`, { headers })
  })

  test('what was typed stays with a new key if the person keeps it, also after a mistake', async ({
    page,
    request,
  }) => {
    const headers = { Authorization: 'Bearer let-me-in' }
    const create = async (name: string) =>
      (await request.post(`${address}/v1/keys`, { headers, data: { name, tenant: 'renewed', role: 'manage' } })).json()
    const dialog = page.getByRole('dialog')
    const keeps = dialog.getByLabel('Keep what is in this tab')
    const use = async (key: string) => {
      const loaded = page.waitForEvent('load')
      await dialog.getByLabel('API key').fill(key)
      await page.keyboard.press('Enter')
      await loaded
    }
    const [old, renewed, last] = [await create('old'), await create('renewed'), await create('last')]
    await page.goto(address)
    await expect(keeps).toBeHidden()
    await use(old.key)
    await page.getByRole('button', { name: 'Drawings with made-up words' }).click()
    const text = page.getByRole('textbox', { name: 'Text of shot 3' })
    await expect(text).toHaveValue('blicket')
    await expect(page.getByRole('button', { name: /^Ask with 0 to/ })).toBeEnabled()
    await request.delete(`${address}/v1/keys/${old.id}`, { headers })
    await text.fill('typed')
    await expect(dialog).toHaveAccessibleName('This server refused the key')
    await keeps.check()
    await use('wrong')
    await expect(dialog).toHaveAccessibleName('This server refused the key')
    await keeps.check()
    await use(renewed.key)
    await expect(text).toHaveValue('typed')
    await expect(page.getByTestId('answer')).not.toBeEmpty()
    await expect(dialog).toBeHidden()

    await request.delete(`${address}/v1/keys/${renewed.id}`, { headers })
    await text.fill('typed later')
    await expect(keeps).not.toBeChecked()
    await use(last.key)
    await expect(page.getByText('Add a picture to ask about.')).toBeVisible()
    await expect(text).toBeHidden()
  })

  test('the key is changed, and another tenant sees nothing of the first', async ({ page, request }) => {
    const headers = { Authorization: 'Bearer let-me-in' }
    await request.post(`${address}/v1/support_sets`, { headers, data: { name: 'ours', examples: [] } })
    const other = { name: 'other', tenant: 'other', role: 'manage' }
    const { key } = await (await request.post(`${address}/v1/keys`, { headers, data: other })).json()
    // it has the same pictures, with the same ids
    for (const name of ['noto', 'fluent'].flatMap((set) =>
      ['elephant', 'bicycle', 'banana'].map((it) => `${set}-${it}`),
    )) {
      const data = readFileSync(`public/examples/${name}.png`)
      await request.post(`${address}/v1/images`, { headers: { Authorization: `Bearer ${key}` }, data })
    }

    await page.goto(address)
    const dialog = page.getByRole('dialog')
    await dialog.getByLabel('API key').fill('let-me-in')
    await page.keyboard.press('Enter')
    await page.getByRole('button', { name: 'Drawings with made-up words' }).click()
    await expect(page.getByRole('textbox', { name: 'Text of shot 3' })).toHaveValue('blicket')
    await page.waitForTimeout(600)
    await page.getByRole('link', { name: 'Support sets' }).click()
    await expect(page.getByRole('link', { name: 'ours' })).toBeVisible()

    await page.getByRole('button', { name: 'Key', exact: true }).click()
    await expect(dialog).toHaveAccessibleName('The key of this tab')
    await expect(dialog.getByRole('checkbox')).toBeHidden()
    await dialog.getByLabel('API key').fill(key)
    await page.keyboard.press('Enter')
    await expect(page.getByText('There is no support set yet.')).toBeVisible()
    await page.getByRole('link', { name: 'Try', exact: true }).click()
    await expect(page.getByText('Add a picture to ask about.')).toBeVisible()
    await expect(page.getByRole('textbox', { name: 'Text of shot 1' })).toHaveCount(0)

    await page.getByRole('button', { name: 'Key', exact: true }).click()
    await dialog.getByRole('button', { name: 'Forget the key' }).click()
    await expect(dialog).toHaveAccessibleName('This server needs a key')
  })
})
