// URLs under which the page can show uploaded images and videos: an element's `src` cannot carry a key.
import { send } from '../api/request'

/** Contents that no element shows, kept for those that will. The browser's own cache has more. */
const MAX_UNUSED = 64

export type Content = { id: string; url: Promise<string>; users: number }
const contents = new Map<string, Content>()

/** Returns a content, whose URL is valid until `release`. */
export function hold(id: string): Content {
  const content = contents.get(id) ?? { id, url: download(id), users: 0 }
  content.users += 1
  contents.delete(id) // the last in the map is the one that was used last
  contents.set(id, content)
  content.url.catch(() => forget(content)) // the next one tries again
  return content
}

export function release(content: Content) {
  content.users -= 1
  const unused = [...contents.values()].filter(({ users }) => !users)
  for (const oldest of unused.slice(0, -MAX_UNUSED)) {
    forget(oldest)
    oldest.url.then(URL.revokeObjectURL, () => undefined)
  }
}

function forget(content: Content) {
  if (contents.get(content.id) === content) contents.delete(content.id)
}

async function download(id: string): Promise<string> {
  const response = await send(`/v1/images/${id}/content`)
  return URL.createObjectURL(await response.blob())
}
