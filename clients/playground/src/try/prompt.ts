// What a workspace asks the server: the parts of its prompt for a number of shots, and the request.
import type { CopiedRequest } from '../app/copy/curl'
import { server } from '../app/server.svelte'
import { part } from '../media/pictures'
import type { Shot, Workspace } from './workspace.svelte'

export type Part = ReturnType<typeof part> | { type: 'text'; text: string } | { type: 'end_of_chunk' }
/** A request to the server. `key` is equal for equal requests to the same model, `end` is what follows an answer. */
export type Request = CopiedRequest & { key: string; end: string }

const ANSWER = '{answer}'
const LINE_END = '\n'
const MAX_TOKENS = 12
const ALTERNATIVES = 5

/** Splits a pattern at its answer: the text before it and the text after it. Without one, the answer is its last word. */
export function splitPattern(pattern: string): [string, string] {
  const at = pattern.indexOf(ANSWER)
  if (at < 0) return [pattern.trim() && `${pattern.trimEnd()} `, '']
  return [pattern.slice(0, at), pattern.slice(at + ANSWER.length)]
}

/** Returns the sentence of a shot. */
export function sentence(pattern: string, answer: string): string {
  const [before, after] = splitPattern(pattern)
  return `${before}${answer}${after}`
}

/** Returns the prompt: each shot with its sentence, and the query with the sentence up to its answer. */
export function promptParts(workspace: Workspace, shots: number): Part[] {
  const query = workspace.queries[workspace.query]
  const start = splitPattern(workspace.pattern)[0].trimEnd() // the space before a word belongs to the word's token
  return [
    ...workspace.shots.slice(0, shots).flatMap((shot) => shotParts(workspace.pattern, shot)),
    ...(query ? [part(query)] : []),
    ...(start ? [{ type: 'text', text: start } as const] : []),
  ]
}

function shotParts(pattern: string, shot: Shot): Part[] {
  const text = sentence(pattern, shot.text)
  return server.hasEndOfChunk
    ? [part(shot.picture), { type: 'text', text }, { type: 'end_of_chunk' }]
    : [part(shot.picture), { type: 'text', text: text + LINE_END }]
}

/** Returns what the workspace asks with a number of shots. */
export function requestOf(workspace: Workspace, shots: number): Request {
  const { path, body }: CopiedRequest =
    workspace.task === 'write'
      ? { path: '/v1/completions', body: completionBody(workspace, shots) }
      : { path: '/v1/classify', body: classifyBody(workspace, shots) }
  const end = splitPattern(workspace.pattern)[1].trim()
  return { path, body, end, key: `${server.model} ${path} ${JSON.stringify(body)}` }
}

function completionBody(workspace: Workspace, shots: number) {
  const end = splitPattern(workspace.pattern)[1].trim()
  // "St. Bernard" would end at a full stop
  const isInAnswers = workspace.shots.some((shot) => shot.text.includes(end))
  const after = end && !isInAnswers ? end : server.hasEndOfChunk ? '' : LINE_END
  return {
    prompt: promptParts(workspace, shots),
    max_tokens: MAX_TOKENS,
    temperature: 0,
    ...(after ? { stop: after } : {}),
    logprobs: ALTERNATIVES,
  }
}

/** All labels are candidates, also those that no shown shot has. */
function classifyBody(workspace: Workspace, shots: number) {
  return {
    query: { image: workspace.queries[workspace.query]?.id },
    shots: workspace.shots.slice(0, shots).map((shot) => ({ image: shot.picture.id, label: shot.text.trim() })),
    candidates: labels(workspace),
    method: workspace.method,
    template: { shot: `{media}${sentence(workspace.pattern, '{label}')}` },
  }
}

export function labels(workspace: Workspace): string[] {
  return labelsOf(workspace.shots)
}

const labelsOf = (shots: Shot[]) => [...new Set(shots.map((shot) => shot.text.trim()).filter(Boolean))]

/** Returns the smallest number of shots that can be asked with: a method by likeness needs an example of each label. */
export function fewestShots(workspace: Workspace): number {
  if (workspace.task === 'write' || ['auto', 'in_context'].includes(workspace.method)) return 0
  const all = labels(workspace).length
  const covers = (shots: number) => labelsOf(workspace.shots.slice(0, shots)).length === all
  return [...workspace.shots.keys()].find(covers) ?? workspace.shots.length
}

/** Says what is missing before the workspace can be asked, or returns null. */
export function whatIsMissing(workspace: Workspace, missing: Record<string, true>): string | null {
  const query = workspace.queries[workspace.query]
  const shown = workspace.shots.slice(0, workspace.shown)
  const gone = shown.findIndex((shot) => missing[shot.picture.id])
  const untold = shown.findIndex((shot) => !shot.text.trim())
  if (!query) return 'Add a picture to ask about.'
  if (missing[query.id]) return 'The picture to ask about is no longer on the server. Remove it.'
  if (gone >= 0) return `The picture of shot ${gone + 1} is no longer on the server. Remove it.`
  if (untold >= 0) return `Type the text of shot ${untold + 1}.`
  if (workspace.pattern.split(ANSWER).length > 2) return `Use ${ANSWER} once.`
  if (workspace.task === 'choose' && labels(workspace).length < 2)
    return 'Choosing needs shots with two different labels.'
  return null
}
