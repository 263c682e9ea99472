// A request to this server, with the key of the tab. Throws an `ApiError` if there is no answer, or if it is a refusal.
import { ApiError, throwUnlessOk } from './errors'
import { key } from './key.svelte'
import { uploadLost } from './lost'

export async function send(input: RequestInfo | URL, init?: RequestInit): Promise<Response> {
  const request = new Request(input, init)
  if (key.value) request.headers.set('Authorization', `Bearer ${key.value}`)
  // only JSON names pictures, and a copy of another body could be large
  if (request.headers.get('Content-Type') !== 'application/json') return answer(request)
  const body = await request.text()
  const ask = () => answer(new Request(request, { body }))
  try {
    return await ask()
  } catch (error) {
    await uploadLost(error, body, request.signal)
    return ask()
  }
}

async function answer(request: Request): Promise<Response> {
  const response = await fetch(request).catch(throwUnreachable)
  await throwUnlessOk(response)
  return response
}

/** Returns a new key. `crypto.randomUUID` is missing where the page is served over http from another machine. */
export function newKey(): string {
  return crypto.getRandomValues(new Uint32Array(4)).join('-')
}

/** A `fetch` without an answer throws a `TypeError`, as mistakes in code do. */
function throwUnreachable(error: unknown): never {
  throw error instanceof TypeError ? new ApiError('The server cannot be reached.', 0, 'unreachable', null) : error
}
