// What differs between two versions of a support set.
import type { Example } from '../calls'

export type Change = { before: Example; after: Example }
export type Comparison = { added: Example[]; removed: Example[]; changed: Change[] }

export function compare(before: Example[], after: Example[]): Comparison {
  const old = new Map(before.map((example) => [example.id, example]))
  const current = new Map(after.map((example) => [example.id, example]))
  return {
    added: after.filter(({ id }) => !old.has(id)),
    removed: before.filter(({ id }) => !current.has(id)),
    changed: before
      .flatMap((example) => (current.has(example.id) ? { before: example, after: current.get(example.id)! } : []))
      .filter(({ before, after }) => JSON.stringify(before) !== JSON.stringify(after)),
  }
}

/** Returns the fields that a person edits and that differ, as "label: cat → dog". */
export function describe({ before, after }: Change): string[] {
  const texts = (['label', 'text', 'question'] as const)
    .filter((field) => before[field] !== after[field])
    .map((field) => `${field}: ${before[field] || 'none'} → ${after[field] || 'none'}`)
  const isOther = (field: 'media' | 'metadata') => JSON.stringify(before[field]) !== JSON.stringify(after[field])
  return [...texts, ...(['media', 'metadata'] as const).filter(isOther).map((field) => `other ${field}`)]
}
