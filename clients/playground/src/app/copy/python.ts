// A request as a program that uses `flamboyance_client`, or httpx for a route that the client has no method for.
import { KEY_VARIABLE, type CopiedRequest, type Server } from './curl'
import { literal } from './literal'

/** A method of the client: the route that it calls, the field that it takes by position, and what to print of its result. */
type ClientMethod = { method: string; route: RegExp; name: string; first?: string; print: string }

const METHODS: ClientMethod[] = [
  { method: 'POST', route: /^\/v1\/completions$/, name: 'complete', first: 'prompt', print: 'result.text' },
  {
    method: 'POST',
    route: /^\/v1\/fewshot\/completions$/,
    name: 'fewshot.complete',
    first: 'query',
    print: 'result.text',
  },
  {
    method: 'POST',
    route: /^\/v1\/classify$/,
    name: 'classify',
    first: 'query',
    print: 'result.label, result.probabilities',
  },
  { method: 'POST', route: /^\/v1\/inspect$/, name: 'inspect', first: 'prompt', print: 'result' },
  { method: 'POST', route: /^\/v1\/support_sets$/, name: 'support_sets.create', print: 'result' },
  { method: 'GET', route: /^\/v1\/support_sets\/([^/?]+)$/, name: 'support_sets.get', print: 'result' },
  {
    method: 'POST',
    route: /^\/v1\/support_sets\/([^/?]+)\/search$/,
    name: 'support_sets.search',
    first: 'query',
    print: 'result',
  },
  { method: 'POST', route: /^\/v1\/support_sets\/([^/?]+)\/evaluate$/, name: 'support_sets.evaluate', print: 'result' },
  {
    method: 'GET',
    route: /^\/v1\/support_sets\/([^/?]+)\/diagnostics$/,
    name: 'support_sets.diagnostics',
    print: 'result',
  },
]

export function python(request: CopiedRequest, server: Server): string {
  const { method, path } = request
  const found = METHODS.find((candidate) => candidate.method === method && candidate.route.test(path))
  return found ? withClient(found, request, server) : withHttpx(request, server)
}

function withClient({ route, name, first, print }: ClientMethod, request: CopiedRequest, server: Server): string {
  const fields: Record<string, unknown> = { ...request.body }
  const positional = [...route.exec(request.path)!.slice(1).map(decodeURIComponent), ...(first ? [fields[first]] : [])]
  if (first) delete fields[first]
  const values = [
    ...positional.map((value) => literal(value, 'python', 2)),
    ...Object.entries(fields).map(([field, value]) => `${field}=${literal(value, 'python', 2)}`),
  ]
  return [
    ...(server.needsKey ? ['import os', ''] : []),
    'from flamboyance_client import Client',
    '',
    `client = Client(${JSON.stringify(server.url)}${server.needsKey ? `, api_key=${key}` : ''})`,
    `result = client.${name}(${values.length ? `\n  ${values.join(',\n  ')},\n` : ''})`,
    `print(${print})`,
    '',
  ].join('\n')
}

function withHttpx({ method, path, body }: CopiedRequest, { url, needsKey }: Server): string {
  const values = [
    JSON.stringify(method),
    JSON.stringify(url + path),
    ...(needsKey ? [`headers={"Authorization": "Bearer " + ${key}}`] : []),
    ...(body ? [`json=${literal(body, 'python', 2)}`] : []),
  ]
  return [
    ...(needsKey ? ['import os', ''] : []),
    'import httpx',
    '',
    `result = httpx.request(\n  ${values.join(',\n  ')},\n).raise_for_status()`,
    'print(result.json())',
    '',
  ].join('\n')
}

const key = `os.environ["${KEY_VARIABLE}"]`
