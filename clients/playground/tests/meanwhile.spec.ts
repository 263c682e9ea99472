// What other clients change, and what a person does, while something takes its time.
import { expect, test, type Page, type Route } from '@playwright/test'
import { readFileSync } from 'node:fs'

const picture = (name: string) => ({
  ...{ name, mimeType: 'image/jpeg' },
  buffer: Buffer.concat([readFileSync('public/examples/brick-1.jpg'), Buffer.from(`meanwhile ${name}`)]),
})
const examples = [
  { id: 'one', text: 'one' },
  { id: 'two', text: 'two' },
]

/** Holds the first uploads of a page until they are released. */
async function holdUploads(page: Page, times?: number) {
  const held: Route[] = []
  await page.route('/v1/images', (route) => void held.push(route), { times })
  const arrived = (count: number) => expect.poll(() => held.length).toBe(count)
  return { held, arrived }
}

test('a set that another client has changed is shown with its new examples after warming', async ({
  page,
  request,
}) => {
  const path = '/v1/support_sets/warmed-elsewhere'
  await request.post('/v1/support_sets', { data: { name: 'warmed-elsewhere', examples } })
  await page.goto('/#/sets/warmed-elsewhere')
  await expect(page.getByText('version 1', { exact: true })).toBeVisible()
  await request.post(`${path}/examples`, { data: { examples: [{ id: 'one', text: 'changed' }] } })
  await page.getByRole('button', { name: 'Warm' }).click()
  await expect(page.getByText('version 2', { exact: true })).toBeVisible()
  await expect(page.getByRole('button', { name: 'Edit changed one' })).toBeVisible()
  await request.delete(path)
})

test('a set that another client has changed is shown as it is when the page is looked at again', async ({
  page,
  request,
}) => {
  const path = '/v1/support_sets/looked-at-again'
  await request.post('/v1/support_sets', { data: { name: 'looked-at-again', examples } })
  await page.goto('/#/sets/looked-at-again')
  await expect(page.getByText('version 1', { exact: true })).toBeVisible()
  await expect(page).toHaveTitle('looked-at-again · Support sets · Flamboyance')
  await request.post(`${path}/examples`, { data: { examples: [{ id: 'one', text: 'changed' }] } })
  await page.evaluate(() => document.dispatchEvent(new Event('visibilitychange')))
  await expect(page.getByRole('button', { name: 'Edit changed one' })).toBeVisible()
  await page.getByRole('button', { name: 'Delete' }).click()
  await page.keyboard.press('Escape')
  await expect(page.getByText('Delete all versions?')).toBeHidden()
  await request.delete(path)
})

test('a set that was made again under the same name gets nothing of the old one', async ({ page, request }) => {
  const path = '/v1/support_sets/made-again'
  await request.post('/v1/support_sets', { data: { name: 'made-again', examples } })
  await page.goto('/#/sets/made-again')
  await expect(page.getByRole('article')).toHaveCount(2)
  await request.delete(path)
  await request.post('/v1/support_sets', { data: { name: 'made-again', examples: [{ id: 'new', text: 'new' }] } })
  await page.getByRole('button', { name: 'Edit one one' }).click()
  await page.getByLabel('Question').fill('which?')
  await page.getByRole('button', { name: 'Save as version 2' }).click()
  await expect(page.getByRole('alert')).toContainText('The set was changed elsewhere.')
  const { data } = await (await request.get(`${path}/examples`)).json()
  expect(data.map(({ id }: { id: string }) => id)).toEqual(['new'])
  await request.delete(path)
})

test('the label of added pictures is the one at the drop', async ({ page, request }) => {
  const path = '/v1/support_sets/labelled-at-the-drop'
  await request.post('/v1/support_sets', { data: { name: 'labelled-at-the-drop', examples: [] } })
  await page.goto('/#/sets/labelled-at-the-drop')
  const adding = page.getByRole('region', { name: 'Add examples' })
  const { held, arrived } = await holdUploads(page)
  await adding.getByRole('combobox').fill('cat')
  await adding.getByTestId('files').setInputFiles(picture('cat.jpg'))
  await arrived(1)
  await adding.getByRole('combobox').fill('dog')
  await held[0]!.continue()
  await expect(page.getByRole('article')).toHaveCount(1)
  const { data } = await (await request.get(`${path}/examples`)).json()
  expect(data[0].label).toBe('cat')
  await request.delete(path)
})

test('a drop that fails is shown although another one was uploaded meanwhile', async ({ page }) => {
  await page.goto('/')
  const { held, arrived } = await holdUploads(page)
  const files = page.getByTestId('files').first()
  await files.setInputFiles(picture('first.jpg'))
  await arrived(1)
  await files.setInputFiles(picture('second.jpg'))
  await arrived(2)
  await held[1]!.continue()
  await expect(page.getByRole('textbox', { name: 'Text of shot 1' })).toBeVisible()
  await held[0]!.abort()
  await expect(page.getByRole('alert')).toContainText('The server cannot be reached.')
  await page.unroute('/v1/images')
  await page.getByRole('button', { name: 'Try again' }).click()
  await expect(page.getByRole('textbox', { name: 'Text of shot 2' })).toBeVisible()
  await expect(page.getByRole('alert')).toHaveCount(0)
})

test('pictures that are being uploaded take their room already', async ({ page }) => {
  await page.goto('/')
  const { arrived } = await holdUploads(page)
  const files = page.getByTestId('files').first()
  const pictures = (name: string) => Array.from({ length: 40 }, (_, at) => picture(`${name} ${at}.jpg`))
  await files.setInputFiles(pictures('first'))
  await arrived(4)
  await files.setInputFiles(pictures('second'))
  await expect(page.getByRole('alert')).toHaveText('There was room for 23 of 40 pictures.')
})

test('a picture in the last place is not replaced by the next one', async ({ page }) => {
  await page.goto('/')
  const files = page.getByTestId('files').last()
  await files.setInputFiles(Array.from({ length: 23 }, (_, at) => picture(`query ${at}.jpg`)))
  await expect(page.getByRole('progressbar')).toHaveCount(0)
  const { held, arrived } = await holdUploads(page, 1)
  await files.setInputFiles(picture('last.jpg'))
  await arrived(1)
  await files.setInputFiles(picture('too many.jpg'))
  await expect(page.getByRole('alert')).toHaveText('There was room for 0 of 1 pictures.')
  await held[0]!.continue()
  await expect(page.getByRole('button', { name: 'Ask about last.jpg' })).toBeVisible()
})

test('a picture whose upload ends late does not become part of another prompt', async ({ page }) => {
  await page.goto('/')
  const { held, arrived } = await holdUploads(page, 1)
  await page.getByTestId('files').first().setInputFiles(picture('late.jpg'))
  await arrived(1)
  await page.getByRole('button', { name: 'Drawings with made-up words' }).click()
  await expect(page.getByTestId('answer')).not.toBeEmpty()
  const shots = page.getByRole('textbox', { name: /^Text of shot/ })
  const number = await shots.count()
  const uploaded = page.waitForResponse('/v1/images')
  await held[0]!.continue()
  await uploaded
  await expect(page.getByRole('progressbar')).toHaveCount(0)
  await expect(shots).toHaveCount(number)
})

test('a method by likeness is asked with an example of each label first', async ({ page }) => {
  await page.goto('/')
  await page.getByRole('button', { name: 'Textures' }).click()
  await expect(page.getByTestId('answer')).not.toBeEmpty()
  await page.getByRole('button', { name: 'Choose', exact: true }).click()
  await page.getByLabel('Method').selectOption('nearest_mean')
  const ask = page.getByRole('button', { name: /^Ask with [1-9]\d* to / })
  await ask.click()
  await expect(page.getByRole('button', { name: 'Stop' })).toBeVisible()
  await expect(page.getByRole('alert')).toHaveCount(0)
  await expect(ask).toBeVisible()
})

test('the page works in a browser that blocks the storage of sites', async ({ page }) => {
  await page.addInitScript(() => {
    for (const name of ['localStorage', 'sessionStorage'])
      Object.defineProperty(window, name, {
        get() {
          throw new DOMException('denied', 'SecurityError')
        },
      })
  })
  await page.goto('/')
  await page.getByRole('button', { name: 'Drawings with made-up words' }).click()
  await expect(page.getByTestId('answer')).not.toBeEmpty()
})

test('a wrong number in closed options is shown', async ({ page, request }) => {
  const labelled = ['a', 'b', 'a', 'b'].map((label, at) => ({ question: `question ${at}`, label }))
  const set = { name: 'evaluated-wrongly', examples: labelled }
  await request.post('/v1/support_sets', { data: set })
  await page.goto('/#/sets/evaluated-wrongly/evaluations')
  const draws = page.getByLabel('Draws of random shots')
  await page.getByText('More options').click()
  await draws.fill('9')
  await page.getByText('More options').click()
  await expect(draws).toBeHidden()
  await page.getByRole('button', { name: 'Evaluate' }).click()
  await expect(draws).toBeVisible()
  await request.delete('/v1/support_sets/evaluated-wrongly')
})
