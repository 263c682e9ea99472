// Whether the server is ready, and which model it serves: asked every few seconds while the page is visible.
import { api, type Schemas } from '../api/client'
import { ApiError } from '../api/errors'
import { key } from '../api/key.svelte'

const PERIOD = { ready: 10_000, waiting: 1_000 }

export const server = $state({
  isReady: false,
  reason: 'connecting …',
  model: '',
  visualTokens: 0,
  maxMedia: 0,
  /** How many examples a set may have. */
  maxSetExamples: Infinity,
  /** Whether the model has a token that ends a shot. Without one, a line break does. */
  hasEndOfChunk: true,
  /** How pictures become the square that the encoder reads. */
  resize: 'squash' as Schemas['Vision']['resize'],
})

/** Starts to watch, and returns the function that stops it. */
export function watchServer() {
  let timer: ReturnType<typeof setTimeout>
  async function ask() {
    if (!document.hidden && !key.isNeeded) await look()
    timer = setTimeout(ask, server.isReady ? PERIOD.ready : PERIOD.waiting)
  }
  void ask()
  return () => clearTimeout(timer)
}

async function look() {
  try {
    const response = await fetch('/health/ready')
    const { status } = await response.json()
    server.reason = status.replaceAll('_', ' ')
    if (status === 'ready' && !server.isReady) await describe()
    server.isReady = status === 'ready'
  } catch (error) {
    server.isReady = false
    server.reason = error instanceof ApiError && error.status === 401 ? 'needs a key' : 'not reachable'
  }
}

/** A server that was away may have come back with another model. */
async function describe() {
  const { data } = await api.GET('/v1/models')
  const model = data!.data[0]!
  server.model = model.id
  server.visualTokens = model.vision.visual_tokens
  server.maxMedia = model.vision.max_media_per_request
  server.maxSetExamples = model.max_set_examples
  server.hasEndOfChunk = model.end_of_chunk !== null
  server.resize = model.vision.resize
}
