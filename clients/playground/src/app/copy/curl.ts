// A request as a command for a POSIX shell.
import { literal } from './literal'

/** A POST request with a body in JSON. */
export type CopiedRequest = { path: '/v1/completions' | '/v1/classify'; body: object }
/** Where the server is, and whether it needs a key. The key itself is never copied. */
export type Server = { url: string; needsKey: boolean }

export const KEY_VARIABLE = 'FLAMBOYANCE_API_KEY'

export function curl({ path, body }: CopiedRequest, { url, needsKey }: Server): string {
  return [
    `curl ${quoted(url + path)}`,
    ...(needsKey ? [`-H "Authorization: Bearer $${KEY_VARIABLE}"`] : []),
    "-H 'Content-Type: application/json'",
    `-d ${quoted(literal(body, 'json'))}`,
  ].join(' \\\n  ')
}

function quoted(text: string): string {
  return /^[\w:/.-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`
}
