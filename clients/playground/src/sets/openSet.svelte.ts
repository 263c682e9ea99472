// The set that is shown: its latest version with all examples. Each change makes a version, which is then loaded.
import {
  putExamples,
  readExamples,
  readSet,
  removeExamples,
  type Example,
  type NewExample,
  type SetInfo,
} from './calls'

const WARMING_PERIOD = 500

export class OpenSet {
  info = $state.raw<SetInfo | null>(null)
  examples = $state.raw<Example[]>([])
  readonly labels = $derived(this.info ? Object.keys(this.info.label_counts) : [])
  readonly byId = $derived(new Map(this.examples.map((example) => [example.id, example])))

  constructor(readonly name: string) {}

  async load(): Promise<void> {
    const info = await readSet(this.name)
    this.examples = await readExamples(this.name, info.version)
    this.info = info
  }

  async put(examples: NewExample[]): Promise<void> {
    await putExamples(this.name, this.info!.version, examples)
    await this.load()
  }

  async remove(ids: string[]): Promise<void> {
    await removeExamples(this.name, this.info!.version, ids)
    await this.load()
  }

  /** Gives an example another label. Without one, its text is its label. */
  async relabel(id: string, label: string): Promise<void> {
    const example = this.byId.get(id)!
    await this.put([stored({ ...example, ...(example.label ? { label } : { text: label }) })])
  }

  /** Follows the status until the set is no longer warming. */
  async watchWarming(info: SetInfo): Promise<void> {
    this.info = info
    while (this.info.status === 'warming' || this.info.status === 'pending') {
      await new Promise((resolve) => setTimeout(resolve, WARMING_PERIOD))
      const { status, warm } = await readSet(this.name)
      this.info = { ...this.info, status, warm }
    }
  }
}

/** Returns an example as it can be sent. */
export function stored({ id, media, text, question, label, metadata }: Example): NewExample {
  return { id, media, text, question, label, metadata }
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
