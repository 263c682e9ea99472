// Images and videos: what a person drops, uploaded once. Their ids are derived from their content.
import { fromEvent } from 'file-selector'
import { api, type Schemas } from '../api/client'
import { ApiError } from '../api/errors'
import { rememberUpload } from '../api/lost'
import { send } from '../api/request'

/** An uploaded image or video. `folder` is the name of the subfolder that it came from, '' without one. */
export type Picture = { id: string; name: string; folder: string; isVideo: boolean; frames: number }

/** A file, the folder that was dropped, and the subfolder that it is in: the label, if pictures are sorted by label. */
export type Dropped = { file: File; root: string; folder: string }

/**
 * Returns the files of a drop or of a file input, folders included, without hidden files, in the order of their paths.
 * A subfolder is directly below the folder that was dropped, as in `from_folder` of the Python client. Several folders that
 * are dropped together are the subfolders.
 */
export async function filesOf(event: Event): Promise<Dropped[]> {
  const items = (await fromEvent(event)) as (File & { path?: string; relativePath?: string })[]
  const files = items
    .map((file) => ({ file, path: (file.relativePath ?? file.path ?? file.name).replace(/^\.?\//, '') }))
    .filter(({ path }) => !path.split('/').some((part) => part.startsWith('.')))
    .sort((a, b) => a.path.localeCompare(b.path, undefined, { numeric: true }))
    .map(({ file, path }) => ({ file, folders: path.split('/').slice(0, -1) }))
  const outermost = new Set(files.map(({ folders }) => folders[0] ?? ''))
  const isOne = outermost.size === 1
  const root = isOne ? [...outermost][0]! : ''
  return files.map(({ file, folders }) => ({ file, root, folder: (folders[isOne ? 1 : 0] ?? '').normalize('NFC') }))
}

/** Returns whether a file may be an image or a video, as far as its name tells: others are left out when they are uploaded. */
export const mayBePicture = ({ file }: Dropped) => !file.type || /^(image|video)\//.test(file.type)

/** Uploads a file. Throws an `ApiError` that names the file if it is no image or video, or can no longer be read. */
export async function upload(file: Blob, name: string, folder = '', signal?: AbortSignal): Promise<Picture> {
  const headers = { 'Content-Type': 'application/octet-stream' }
  const response = await send('/v1/images', { method: 'POST', headers, body: file, signal }).catch(async (error) => {
    if (!(error instanceof ApiError)) throw error
    if (error.status === 0 && !(await isReadable(file)))
      throw new ApiError(`${name}: it was changed, moved or removed after it was chosen`, 400, 'unreadable', null)
    throw new ApiError(`${name}: ${error.message}`, error.status, error.code, error.param)
  })
  const stored: Schemas['StoredImage'] = await response.json()
  rememberUpload(stored.id, async (signal) => {
    if (await isLost(stored.id, signal)) await upload(file, name, folder, signal)
  })
  return { id: stored.id, name, folder, isVideo: stored.object === 'video', frames: stored.frames ?? 1 }
}

/** Returns whether the server has no such picture. */
export async function isLost(id: string, signal?: AbortSignal): Promise<boolean> {
  try {
    await api.GET('/v1/images/{image_id}', { params: { path: { image_id: id } }, signal })
    return false
  } catch (error) {
    if (error instanceof ApiError && error.status === 404) return true
    throw error
  }
}

/** The browser reads a file when it sends it: one that has changed since it was chosen fails like a lost connection. */
async function isReadable(file: Blob): Promise<boolean> {
  return file.arrayBuffer().then(
    () => true,
    () => false,
  )
}

/** Returns a picture as a part of a prompt. */
export function part(picture: Picture) {
  return picture.isVideo
    ? ({ type: 'video_id', video_id: picture.id } as const)
    : ({ type: 'image_id', image_id: picture.id } as const)
}
