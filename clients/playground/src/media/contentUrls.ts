// URLs under which the page can show uploaded images and videos: an element's `src` cannot carry a key.
import { ApiError } from '../api/errors'
import { send } from '../api/request'

/** Milliseconds until a content that the server did not send is asked for again. */
const PAUSE = 2000
/** The statuses of failures that pass: no answer, too many requests, not available now. */
const PASSING = [0, 429, 503]

/** Contents that no element shows, kept for those that will. The browser's own cache has more. */
const MAX_UNUSED = 64

export type Content = { id: string; url: Promise<string>; users: number }
const contents = new Map<string, Content>()

/** Returns a content, whose URL is valid until `release`. */
export function hold(id: string): Content {
  const content = contents.get(id) ?? begin(id)
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

function begin(id: string): Content {
  const content: Content = { id, url: Promise.resolve(''), users: 0 }
  content.url = download(content)
  return content
}

/** Downloads a content. While an element waits for it, it is asked for until the server sends or refuses it. */
async function download(content: Content): Promise<string> {
  for (;;) {
    try {
      const response = await send(`/v1/images/${content.id}/content`)
      return URL.createObjectURL(await response.blob())
    } catch (error) {
      if (!mayPass(error) || !content.users) throw error
      await new Promise((resolve) => setTimeout(resolve, PAUSE))
    }
  }
}

/** A connection that breaks within the content throws a `TypeError`. */
const mayPass = (error: unknown) =>
  error instanceof TypeError || (error instanceof ApiError && PASSING.includes(error.status))
