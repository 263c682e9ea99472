// A request as a program that uses `flamboyance_client`.
import { KEY_VARIABLE, type CopiedRequest, type Server } from './curl'
import { literal } from './literal'

/** A method of the client: the field that it takes by position, and what to print of its result. */
type ClientMethod = { name: string; first: string; print: string }

const METHODS: Record<CopiedRequest['path'], ClientMethod> = {
  '/v1/completions': { name: 'complete', first: 'prompt', print: 'result.text' },
  '/v1/classify': { name: 'classify', first: 'query', print: 'result.label, result.probabilities' },
}

export function python({ path, body }: CopiedRequest, { url, needsKey }: Server): string {
  const { name, first, print } = METHODS[path]
  const { [first]: positional, ...fields } = body as Record<string, unknown>
  const values = [
    literal(positional, 'python', 2),
    ...Object.entries(fields).map(([field, value]) => `${field}=${literal(value, 'python', 2)}`),
  ]
  return [
    ...(needsKey ? ['import os', ''] : []),
    'from flamboyance_client import Client',
    '',
    `client = Client(${JSON.stringify(url)}${needsKey ? `, api_key=os.environ["${KEY_VARIABLE}"]` : ''})`,
    `result = client.${name}(\n  ${values.join(',\n  ')},\n)`,
    `print(${print})`,
    '',
  ].join('\n')
}
