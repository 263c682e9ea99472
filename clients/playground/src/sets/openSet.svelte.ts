// The set that is shown: its latest version with all examples. Each change makes a version, which is then loaded.
import { ApiError } from '../api/errors'
import { part, type Picture } from '../media/pictures'
import {
  addExamples,
  putExamples,
  readExamples,
  readSet,
  removeExamples,
  warm,
  type Example,
  type NewExample,
  type SetInfo,
} from './calls'

/** The codes of errors if somebody else has changed the set, or has made another one with its name. */
const CHANGED = new Set(['version_conflict', 'support_set_not_found'])

export class OpenSet {
  info = $state.raw<SetInfo | null>(null)
  examples = $state.raw<Example[]>([])
  readonly labels = $derived(this.info ? Object.keys(this.info.label_counts) : [])
  readonly byId = $derived(new Map(this.examples.map((example) => [example.id, example])))

  constructor(readonly name: string) {}

  async load(): Promise<void> {
    const info = await readSet(this.name)
    const examples = await readExamples(info.id, info.version)
    if (info.id === this.info?.id && info.version < this.info.version) return // a later load was faster
    this.examples = examples
    this.info = info
  }

  /** Computes the media of the set in advance. */
  async warm(): Promise<void> {
    await this.#show(await warm(this.info!.id))
  }

  /**
   * Adds examples to the latest version, whichever that is: none of them replaces another. With the same key they are added
   * once, also if the response to the first request was lost.
   */
  async add(examples: NewExample[], key: string): Promise<void> {
    await addExamples(this.info!.id, examples, key)
    await this.load()
  }

  /** Changes some fields of an example. The others are those of the latest version, also if another tab changed them. */
  async edit(id: string, fields: NewExample): Promise<void> {
    const example = this.byId.get(id)
    if (!example) throw new Error('The example was removed elsewhere.')
    await this.#change((version) => putExamples(this.info!.id, [{ ...stored(example), ...fields }], version))
  }

  async remove(ids: string[]): Promise<void> {
    await this.#change((version) => removeExamples(this.info!.id, version, ids))
  }

  /** Changes the version that is shown. If it is not the latest any more, the latest is loaded for the next try. */
  async #change(action: (version: number) => Promise<void>): Promise<void> {
    try {
      await action(this.info!.version)
    } catch (error) {
      if (!(error instanceof ApiError) || !CHANGED.has(error.code ?? '')) throw error
      await this.load()
      throw new Error(`The set was changed elsewhere. Its version ${this.info!.version} is shown now; try again.`)
    }
    await this.load()
  }

  /** Gives an example another label. Without one, its text is its label. */
  async relabel(id: string, label: string): Promise<void> {
    await this.edit(id, this.byId.get(id)?.label ? { label } : { text: label })
  }

  /** Asks for the state again, without the examples. */
  async refreshState(): Promise<void> {
    await this.#show(await readSet(this.name))
  }

  /** Shows the state of the set, with its examples if they are of another version. */
  async #show({ id, version, status, warm }: SetInfo): Promise<void> {
    if (id === this.info!.id && version === this.info!.version) this.info = { ...this.info!, status, warm }
    else await this.load()
  }
}

/** Returns an example as it can be sent. */
function stored({ id, media, text, question, label, metadata }: Example): NewExample {
  return { id, media, text, question, label, metadata }
}

/** Returns an example of each picture. The label is the name of its subfolder, or else the given one. */
export function asExamples(pictures: Picture[], label = ''): NewExample[] {
  return pictures.map((picture) => ({ media: [part(picture)], label: picture.folder || label }))
}

/** What the example teaches the model to answer. */
export const answerOf = (example: Example) => example.label || example.text

/** Returns the examples of each label, in the order of the set. */
export function groupByLabel(examples: Example[]): Map<string, Example[]> {
  const groups = new Map<string, Example[]>()
  for (const example of examples) {
    const group = groups.get(answerOf(example))
    if (group) group.push(example)
    else groups.set(answerOf(example), [example])
  }
  return groups
}

export const STATUS = {
  pending: 'not warm',
  warming: 'warming …',
  ready: 'warm',
  failed: 'warming failed',
} as const satisfies Record<SetInfo['status'], string>
