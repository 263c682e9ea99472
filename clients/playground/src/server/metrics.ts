// The text format of Prometheus, as far as this server writes it: no escaped quotes, no time stamps.

export type Metrics = ReadonlyMap<string, number>

const PREFIX = 'flamboyance:'
const LINE = /^([\w:]+)(?:\{(.*)\})? (\S+)$/

/**
 * Returns the values by name without the prefix. Values that differ in labels are added: `request_success_total` is the number
 * of all finished requests. Buckets of histograms are left out.
 */
export function parseMetrics(text: string): Metrics {
  const values = new Map<string, number>()
  for (const line of text.split('\n')) {
    const [, name = '', , value = ''] = LINE.exec(line) ?? []
    if (!name.startsWith(PREFIX) || name.endsWith('_bucket')) continue
    const short = name.slice(PREFIX.length)
    values.set(short, (values.get(short) ?? 0) + Number(value))
  }
  return values
}
