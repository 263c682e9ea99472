// The examples that come with the page: pictures that work with the default model, and their texts.
import { send } from '../api/request'
import { upload, type Picture } from '../media/pictures'
import { addQueries, addShots, clearWorkspace, workspace } from './workspace.svelte'

type Item = { file: string; text: string }
export type Example = { name: string; title: string; pattern: string; shots: Item[]; queries: Item[] }

const FOLDER = '/playground/examples/'

export async function readExamples(): Promise<Example[]> {
  return (await send(`${FOLDER}manifest.json`)).json()
}

export function exampleUrl(file: string): string {
  return FOLDER + file
}

/** Uploads the pictures of an example, and puts them into the workspace in place of what is there. */
export async function openExample(example: Example) {
  const [shots, queries] = await Promise.all([uploadAll(example.shots), uploadAll(example.queries)])
  clearWorkspace()
  workspace.pattern = example.pattern
  addShots(shots)
  addQueries(queries)
}

/** The text of a picture is its folder, as if it had been dropped in one. */
function uploadAll(items: Item[]): Promise<Picture[]> {
  return Promise.all(
    items.map(async ({ file, text }) => upload(await (await send(exampleUrl(file))).blob(), file, text)),
  )
}
