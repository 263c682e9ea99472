// Images and videos: what a person drops, uploaded once. Their ids are derived from their content.
import { fromEvent } from 'file-selector'
import type { Schemas } from '../api/client'
import { ApiError, throwUnlessOk } from '../api/errors'
import { authorization } from '../api/key.svelte'

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
  const response = await fetch('/v1/images', {
    method: 'POST',
    headers: { 'Content-Type': 'application/octet-stream', ...authorization() },
    body: file,
  })
  try {
    await throwUnlessOk(response)
  } catch (error) {
    if (error instanceof ApiError)
      throw new ApiError(`${name}: ${error.message}`, error.status, error.code, error.param)
    throw error
  }
  const stored: Schemas['StoredImage'] = await response.json()
  return { id: stored.id, name, folder, isVideo: stored.object === 'video', frames: stored.frames ?? 1 }
}

const urls = new Map<string, Promise<string>>()

/** Returns a URL under which the page can show an uploaded image or video: an element's `src` cannot carry a key. */
export function contentUrl(id: string): Promise<string> {
  let url = urls.get(id)
  if (!url) {
    url = download(id)
    url.catch(() => urls.delete(id))
    urls.set(id, url)
  }
  return url
}

async function download(id: string): Promise<string> {
  const response = await fetch(`/v1/images/${id}/content`, { headers: authorization() })
  await throwUnlessOk(response)
  return URL.createObjectURL(await response.blob())
}

/** Returns a picture as a part of a prompt. */
export function part(picture: Picture) {
  return picture.isVideo
    ? ({ type: 'video_id', video_id: picture.id } as const)
    : ({ type: 'image_id', image_id: picture.id } as const)
}
