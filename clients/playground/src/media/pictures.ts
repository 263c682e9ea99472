// Images and videos: what a person drops, uploaded once. Their ids are derived from their content.
import { fromEvent } from 'file-selector'
import type { Schemas } from '../api/client'
import { ApiError } from '../api/errors'
import { send } from '../api/request'

/** An uploaded image or video. `folder` is the name of the folder that it came from, '' without one. */
export type Picture = { id: string; name: string; folder: string; isVideo: boolean; frames: number }

/** A file, and the name of its folder: the label, where a person has sorted files into folders. */
export type Dropped = { file: File; folder: string }

/** Returns the files of a drop or of a file input, folders included, without hidden files, in the order of their paths. */
export async function filesOf(event: Event): Promise<Dropped[]> {
  const items = (await fromEvent(event)) as (File & { path?: string; relativePath?: string })[]
  return items
    .map((file) => ({ file, path: (file.relativePath ?? file.path ?? file.name).replace(/^\.?\//, '') }))
    .filter(({ path }) => !path.split('/').some((part) => part.startsWith('.')))
    .sort((a, b) => a.path.localeCompare(b.path, undefined, { numeric: true }))
    .map(({ file, path }) => ({ file, folder: path.split('/').at(-2) ?? '' }))
}

/** Uploads a file. Throws an `ApiError` that names the file if it is no image or video. */
export async function upload(file: Blob, name: string, folder = ''): Promise<Picture> {
  const headers = { 'Content-Type': 'application/octet-stream' }
  const response = await send('/v1/images', { method: 'POST', headers, body: file }).catch((error) => {
    if (!(error instanceof ApiError)) throw error
    throw new ApiError(`${name}: ${error.message}`, error.status, error.code, error.param)
  })
  const stored: Schemas['StoredImage'] = await response.json()
  return { id: stored.id, name, folder, isVideo: stored.object === 'video', frames: stored.frames ?? 1 }
}

/** Returns a picture as a part of a prompt. */
export function part(picture: Picture) {
  return picture.isVideo
    ? ({ type: 'video_id', video_id: picture.id } as const)
    : ({ type: 'image_id', image_id: picture.id } as const)
}
