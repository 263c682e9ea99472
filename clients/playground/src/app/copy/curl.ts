// A request as a command for a POSIX shell.
import { literal } from './literal'

export type CopiedRequest = { method: string; path: string; body?: object }
/** Where the server is, and whether it needs a key. The key itself is never copied. */
export type Server = { url: string; needsKey: boolean }

export const KEY_VARIABLE = 'FLAMBOYANCE_API_KEY'

export function curl({ method, path, body }: CopiedRequest, { url, needsKey }: Server): string {
  const verb = method === (body ? 'POST' : 'GET') ? '' : `-X ${method} `
  return [
    `curl ${verb}${quoted(url + path)}`,
    ...(needsKey ? [`-H "Authorization: Bearer $${KEY_VARIABLE}"`] : []),
    ...(body ? ["-H 'Content-Type: application/json'", `-d ${quoted(literal(body, 'json'))}`] : []),
  ].join(' \\\n  ')
}

function quoted(text: string): string {
  return /^[\w:/.-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`
}
