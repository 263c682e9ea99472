// A request to this server, with the key of the tab. Throws an `ApiError` if there is no answer, or if it is a refusal.
import { ApiError, throwUnlessOk } from './errors'
import { key } from './key.svelte'

export async function send(input: RequestInfo | URL, init?: RequestInit): Promise<Response> {
  const request = new Request(input, init)
  if (key.value) request.headers.set('Authorization', `Bearer ${key.value}`)
  const response = await fetch(request).catch(throwUnreachable)
  await throwUnlessOk(response)
  return response
}

/** A `fetch` without an answer throws a `TypeError`, as mistakes in code do. */
function throwUnreachable(error: unknown): never {
  throw error instanceof TypeError ? new ApiError('The server cannot be reached.', 0, 'unreachable', null) : error
}
