// A request as code that a person can paste. A key is named, and never part of the text.

export type SentRequest = { method: string; path: string; body: unknown }

const KEY = 'FLAMBOYANCE_API_KEY'

/** Returns a command for a POSIX shell. */
export function asCurl({ method, path, body }: SentRequest, server: string, hasKey: boolean): string {
  const json = JSON.stringify(body, null, 2).replaceAll("'", String.raw`'\''`)
  return [
    `curl ${server}${path}`,
    ...(method === 'POST' ? [] : [`-X ${method}`]),
    ...(hasKey ? [`-H "Authorization: Bearer $${KEY}"`] : []),
    `-H 'Content-Type: application/json'`,
    `-d '${json}'`,
  ].join(' \\\n  ')
}

/** Returns a program that needs httpx. */
export function asPython({ method, path, body }: SentRequest, server: string, hasKey: boolean): string {
  const headers = hasKey ? [`    headers={"Authorization": f"Bearer {os.environ['${KEY}']}"},`] : []
  return [
    ...(hasKey ? ['import os', ''] : []),
    'import httpx',
    '',
    'response = httpx.request(',
    `    ${literal(method)},`,
    `    ${literal(server + path)},`,
    ...headers,
    `    json=${literal(body, '    ')},`,
    '    timeout=60,',
    ')',
    'response.raise_for_status()',
    'print(response.json())',
  ].join('\n')
}

/** Returns a JSON value as Python writes it. The escapes of JSON's strings are also Python's. */
function literal(value: unknown, indent = ''): string {
  const inner = `${indent}    `
  if (value === null || value === undefined) return 'None'
  if (typeof value === 'boolean') return value ? 'True' : 'False'
  if (Array.isArray(value)) return `[${value.map((item) => literal(item, indent)).join(', ')}]`
  if (typeof value !== 'object') return JSON.stringify(value)
  const fields = Object.entries(value).filter(([, field]) => field !== undefined)
  const lines = fields.map(([name, field]) => `${inner}${JSON.stringify(name)}: ${literal(field, inner)},`)
  return lines.length ? `{\n${lines.join('\n')}\n${indent}}` : '{}'
}
