// Pictures that the server has lost since this page uploaded them: a request that names them uploads them again, once.
import { ApiError } from './errors'

type Upload = (signal: AbortSignal) => Promise<unknown>

const CONCURRENCY = 4
const ID = /\b(?:img|vid)_[0-9a-f]{64}\b/g
const uploads = new Map<string, Upload>()

/** Keeps how a picture is uploaded again if it is lost. Its id is derived from its content, so it stays the same. */
export function rememberUpload(id: string, upload: Upload) {
  uploads.set(id, upload)
}

/**
 * Uploads the lost pictures in a request again if it was refused without one of them. If they cannot be, throws an error
 * with the same code, because they are still lost.
 */
export async function uploadLost(error: unknown, body: string, signal: AbortSignal): Promise<void> {
  if (!(error instanceof ApiError) || error.code !== 'image_not_found') throw error
  const ids = new Set(body.match(ID))
  const remaining = [...ids].map((id) => uploads.get(id)).filter((upload) => upload !== undefined)
  if (!remaining.length) throw error
  const work = async () => {
    for (let upload = remaining.pop(); upload; upload = remaining.pop()) await upload(signal)
  }
  // one failure ends all of them
  const stop = () => void (remaining.length = 0)
  await Promise.all(Array.from({ length: CONCURRENCY }, () => work().finally(stop))).catch((failure) => {
    if (!(failure instanceof ApiError)) throw failure
    throw new ApiError(failure.message, error.status, error.code, error.param)
  })
}
