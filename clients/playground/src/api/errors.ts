// An error response of the server as an exception, with the field that it is about.
import { key } from './key.svelte'

export class ApiError extends Error {
  constructor(
    message: string,
    readonly status: number,
    readonly code: string | null,
    readonly param: string | null,
  ) {
    super(message)
    this.name = 'ApiError'
  }
}

/** Throws the error of a response; a missing key also opens the dialog that asks for it. */
export async function throwUnlessOk(response: Response): Promise<void> {
  if (response.ok) return
  const body = await response.json().catch(() => null)
  const error = body?.error ?? { message: `${response.status} ${response.statusText}` }
  const wait = response.headers.get('Retry-After')
  if (response.status === 401) {
    key.isNeeded = true
    key.numRefusals += 1
  }
  const message = wait ? `${error.message} (try again in ${wait} s)` : error.message
  throw new ApiError(message, response.status, error.code ?? null, error.param ?? null)
}

/** What to show a person of anything that was thrown. An abort is not an error: null. */
export function messageOf(error: unknown): string | null {
  if (error instanceof DOMException && error.name === 'AbortError') return null
  return error instanceof Error ? error.message : String(error)
}
