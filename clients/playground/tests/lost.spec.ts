// Pictures that the server has lost since the page uploaded them: they are uploaded again, once, and no others are.
import { expect, test, type Page } from '@playwright/test'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

const picture = (name: string) => ({
  ...{ name, mimeType: 'image/jpeg' },
  buffer: Buffer.concat([readFileSync('public/examples/brick-1.jpg'), Buffer.from(`lost ${name}`)]),
})

/** Notes the ids of the pictures that the page uploads. */
function noteUploads(page: Page): string[] {
  const ids: string[] = []
  page.on('response', async (response) => {
    if (response.request().method() === 'POST' && response.url().endsWith('/v1/images'))
      ids.push((await response.json()).id)
  })
  return ids
}

test('a set is made of pictures that the server has lost meanwhile', async ({ page, request }) => {
  const ids = noteUploads(page)
  await page.goto('/#/sets')
  await page.getByTestId('files').setInputFiles([picture('1.jpg'), picture('2.jpg')])
  await page.getByLabel('Name').fill('found-again')
  await page.route('/v1/support_sets', (route) => route.abort())
  await page.getByRole('button', { name: 'Create set' }).click()
  await expect(page.getByRole('alert')).toContainText('The server cannot be reached.')
  await page.unroute('/v1/support_sets')
  await expect.poll(() => ids.length).toBe(2)
  for (const id of ids) await request.delete(`/v1/images/${id}`)
  await page.getByRole('button', { name: 'Create set' }).click()
  await expect(page.getByRole('heading', { level: 1 })).toHaveText('found-again')
  await expect(page.getByRole('article')).toHaveCount(2)
  await expect.poll(() => ids.length).toBe(4)

  // what is not lost is not uploaded again, and what is refused again is shown
  const adding = page.getByRole('region', { name: 'Add examples' })
  await page.route('/v1/support_sets/*/examples', (route) => {
    const error = { message: 'no image or video has the id', type: 'not_found_error', param: null }
    return route.fulfill({ status: 404, json: { error: { ...error, code: 'image_not_found' } } })
  })
  await adding.getByTestId('files').setInputFiles(picture('3.jpg'))
  await expect(adding.getByRole('alert')).toContainText('no image or video has the id')
  await expect.poll(() => ids.length).toBe(5)
  await request.delete('/v1/support_sets/found-again')
})

test('the model is asked about pictures that the server has lost meanwhile', async ({ page, request }) => {
  const ids = noteUploads(page)
  await page.goto('/')
  await page.getByTestId('files').first().setInputFiles(picture('shot.jpg'))
  await page.getByRole('textbox', { name: 'Text of shot 1' }).fill('brick')
  await page.getByTestId('files').last().setInputFiles(picture('query.jpg'))
  await expect(page.getByTestId('answer')).not.toBeEmpty()
  await expect.poll(() => ids.length).toBe(2)
  await request.delete(`/v1/images/${ids[1]}`)
  await page.getByRole('textbox', { name: 'Text of shot 1' }).fill('wall')
  await expect(page.getByTestId('answer')).toHaveText('wall')
  await expect.poll(() => ids).toEqual([ids[0], ids[1], ids[1]])
})

test('a lost picture whose file has changed shows as missing', async ({ page, request }) => {
  const folder = mkdtempSync(join(tmpdir(), 'playground-'))
  const file = join(folder, 'changed.jpg')
  writeFileSync(file, picture('changed.jpg').buffer)
  await page.goto('/')
  await page.getByTestId('files').first().setInputFiles(file)
  const text = page.getByRole('textbox', { name: 'Text of shot 1' })
  await text.fill('brick')
  await page.getByTestId('files').last().setInputFiles(picture('kept.jpg'))
  await expect(page.getByTestId('answer')).not.toBeEmpty()
  rmSync(folder, { recursive: true })
  const { id } = await (await request.post('/v1/images', { data: picture('changed.jpg').buffer })).json()
  await request.delete(`/v1/images/${id}`)
  await text.fill('wall')
  await expect(page.getByText('The picture of shot 1 is no longer on the server. Remove it.')).toBeVisible()
})
