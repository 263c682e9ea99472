// Server-sent events of a route that streams: one JSON chunk per event, until `[DONE]`.
import { EventSourceParserStream } from 'eventsource-parser/stream'
import { ApiError } from './errors'
import { send } from './request'

/** Yields the chunks of a response. Throws an `ApiError` if it is refused, has an error as an event, or ends too early. */
export async function* stream<Chunk>(path: string, body: object, signal: AbortSignal): AsyncGenerator<Chunk> {
  const response = await send(path, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  })
  for await (const data of eventsOf(response)) {
    if (data === '[DONE]') return
    const chunk = JSON.parse(data)
    if (chunk.error) throw new ApiError(chunk.error.message, 200, chunk.error.code, chunk.error.param)
    yield chunk
  }
  throw broken()
}

/** Yields the data of the events. It uses a reader, because not every browser can iterate over a stream. */
async function* eventsOf(response: Response): AsyncGenerator<string> {
  const events = response.body!.pipeThrough(new TextDecoderStream()).pipeThrough(new EventSourceParserStream())
  const reader = events.getReader()
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error instanceof TypeError ? broken() : error
    })
    if (done) return
    yield value.data
  }
}

const broken = () => new ApiError('The connection broke before the answer was complete.', 200, 'broken', null)
