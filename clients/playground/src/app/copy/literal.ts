// A JSON value as source text: short lists and objects on one line, long ones with a line per entry.

export type Language = 'json' | 'python'

const WIDTH = 116
const WORDS = {
  json: { true: 'true', false: 'false', null: 'null' },
  python: { true: 'True', false: 'False', null: 'None' },
}

/** Writes a value. `indent` is the number of spaces before its closing bracket. */
export function literal(value: unknown, language: Language, indent = 0): string {
  if (value === null || typeof value === 'boolean') return WORDS[language][`${value}`]
  if (typeof value !== 'object') return JSON.stringify(value)
  const isList = Array.isArray(value)
  const entries = isList
    ? value.map((item) => ['', item])
    : Object.entries(value).filter(([, item]) => item !== undefined)
  const write = ([name, item]: unknown[], deeper: number) =>
    `${isList ? '' : `${JSON.stringify(name)}: `}${literal(item, language, deeper)}`
  return bracketed(isList ? '[]' : '{}', entries, write, language, indent)
}

function bracketed(
  brackets: string,
  entries: unknown[][],
  write: (entry: unknown[], indent: number) => string,
  language: Language,
  indent: number,
): string {
  const line = `${brackets[0]}${entries.map((entry) => write(entry, 0)).join(', ')}${brackets[1]}`
  if (!line.includes('\n') && line.length + indent <= WIDTH) return line
  const comma = language === 'python' ? ',' : ''
  const inner = ' '.repeat(indent + 2)
  const lines = entries.map((entry) => inner + write(entry, indent + 2))
  return `${brackets[0]}\n${lines.join(',\n')}${comma}\n${' '.repeat(indent)}${brackets[1]}`
}
