// Server-sent events of a route that streams: one JSON chunk per event, until `[DONE]`.
import { EventSourceParserStream } from 'eventsource-parser/stream'
import { ApiError, throwUnlessOk } from './errors'
import { authorization } from './key.svelte'

/** Yields the chunks of a response. Throws an `ApiError` if the request is refused or an event is an error. */
export async function* stream<Chunk>(path: string, body: object, signal: AbortSignal): AsyncGenerator<Chunk> {
  const response = await fetch(path, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json', ...authorization() },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  })
  await throwUnlessOk(response)
  const events = response.body!.pipeThrough(new TextDecoderStream()).pipeThrough(new EventSourceParserStream())
  for await (const event of events) {
    if (event.data === '[DONE]') return
    const chunk = JSON.parse(event.data)
    if (chunk.error) throw new ApiError(chunk.error.message, 200, chunk.error.code, chunk.error.param)
    yield chunk
  }
}
