// Inspections: what the server says about the tokens of a prompt, and the masks that follow from it.
import { api, type Schemas } from '../api/client'
import type { Part } from '../try/prompt'

export type Inspection = Schemas['Inspection']
export type Inspected = { prompt: Part[]; answer?: string; token?: number; layers?: number[] }
/** Which pictures a token reads: the last one before it, or all before it. */
export type Mask = 'last' | 'all'

const known = new Map<string, Promise<Inspection>>()
const MAX_KNOWN = 100

/** Inspects a token. An inspection encodes all pictures again, so its result is kept. */
export function inspect(inspected: Inspected): Promise<Inspection> {
  const key = JSON.stringify(inspected)
  const found = known.get(key)
  if (found) return found
  const reply = post(inspected)
  reply.catch(() => known.delete(key))
  known.set(key, reply)
  for (const oldest of [...known.keys()].slice(0, -MAX_KNOWN)) known.delete(oldest)
  return reply
}

async function post(inspected: Inspected): Promise<Inspection> {
  const { data } = await api.POST('/v1/inspect', { body: inspected as Schemas['InspectRequest'] })
  return data!
}

/** Whether a token reads a picture. `last` is the index of the last picture before the token, or null. */
export function reads(mask: Mask, last: number | null, picture: number): boolean {
  if (last === null) return false
  return mask === 'last' ? picture === last : picture <= last
}

/** The text of a token for people: spaces and line breaks can be seen, special tokens lose their brackets. */
export function shown(text: string): string {
  return (
    text
      .replace(/^<\|?(\w+)\|?>$/, '$1')
      .replace(/^ /, '␣')
      .replaceAll('\n', '⏎') || '∅'
  )
}

export function seriesColour(index: number): string {
  return `var(--series-${index % 8})`
}
