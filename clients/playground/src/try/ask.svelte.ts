// Asks the server what the workspace asks. One request runs at a time; a new one aborts the one before.
import { api, type Schemas } from '../api/client'
import { ApiError, messageOf } from '../api/errors'
import { stream } from '../api/stream'
import { addChunk, classified, emptyAnswer, type Answer } from './answers'
import type { Request } from './prompt'
import { checkPictures, keepAnswer } from './workspace.svelte'

type Asking = {
  /** The request that runs, or the one that `error` is about. */
  request: string
  isRunning: boolean
  /** What has been streamed of the answer. */
  partial: Answer | null
  error: string | null
}

export const asking: Asking = $state({ request: '', isRunning: false, partial: null, error: null })
let running: AbortController | undefined

/** Asks, and keeps the answer in the workspace. An error is kept in `asking`. */
export async function ask(request: Request, shots: number) {
  stopAsking()
  const controller = (running = new AbortController())
  Object.assign(asking, { request: request.key, isRunning: true, partial: null, error: null })
  try {
    const answers = request.path === '/v1/completions' ? write : choose
    const answer = await answers(request, shots, controller.signal)
    if (controller === running) keepAnswer(request.key, answer)
  } catch (error) {
    if (controller === running) asking.error = messageOf(error)
    if (error instanceof ApiError && error.code === 'image_not_found') checkPictures()
  } finally {
    if (controller === running) asking.isRunning = false
  }
}

export function stopAsking() {
  running?.abort()
  running = undefined
  Object.assign(asking, { isRunning: false, partial: null, error: null })
}

async function write({ path, body, end }: Request, shots: number, signal: AbortSignal): Promise<Answer> {
  const start = performance.now()
  let firstToken = 0
  let answer = emptyAnswer(shots)
  for await (const chunk of stream<Schemas['CompletionChunk']>(path, body, signal)) {
    if (chunk.choices[0]?.logprobs?.tokens.length) firstToken ||= performance.now() - start
    answer = addChunk(answer, chunk, firstToken)
    if (!signal.aborted) asking.partial = answer
  }
  const text = answer.text.trimEnd()
  return end && text.endsWith(end) ? { ...answer, text: text.slice(0, -end.length) } : answer
}

async function choose({ body }: Request, shots: number, signal: AbortSignal): Promise<Answer> {
  const start = performance.now()
  const { data } = await api.POST('/v1/classify', { body: body as Schemas['ClassifyRequest'], signal })
  return classified(shots, data!, performance.now() - start)
}
