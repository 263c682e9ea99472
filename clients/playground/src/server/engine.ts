// What /health says about the engine, which its schema leaves open.
import type { Schemas } from '../api/client'
import { seconds, whole } from '../charts/format'

export type Engine = {
  device?: string
  dtype?: string
  /** The format of a shape of weights, by the number of rows from which it is used. */
  weight_formats?: Record<string, Record<string, string>>
  backend?: Record<string, string>
  threads?: number
  num_blocks?: number
  block_size?: number
  num_media_slots?: number
  max_model_len?: number
  load_seconds?: number
}

export const engineOf = (health: Schemas['Health'] | null): Engine => (health?.engine ?? {}) as Engine

/** Returns the facts that are known, as pairs of a name and a text. */
export function facts(engine: Engine): [string, string][] {
  const { backend = {}, weight_formats = {} } = engine
  const formats = [...new Set(Object.values(weight_formats).flatMap((byRows) => Object.values(byRows)))]
  const known: [string, string | undefined][] = [
    [
      'Device',
      backend.device && backend.device !== engine.device ? `${engine.device} (${backend.device})` : engine.device,
    ],
    ['Threads', engine.threads?.toString()],
    ['Number format', engine.dtype],
    ['Weight formats', formats.join(', ')],
    ['Kernels', backend.backend],
    ['PyTorch', backend.torch],
    ['Context', engine.max_model_len && `${whole(engine.max_model_len)} tokens`],
    ['Start took', engine.load_seconds ? seconds(engine.load_seconds) : undefined],
  ].map(([name, text]) => [name, text || undefined] as [string, string | undefined])
  return known.filter((pair): pair is [string, string] => pair[1] !== undefined)
}
