// The shots, the query and the task that Try and Look inside work on. They are kept in this browser, so that a reload keeps
// them; the pictures themselves stay on the server.
import { SvelteMap } from 'svelte/reactivity'
import { newKey } from '../api/request'
import { isLost, type Picture } from '../media/pictures'
import type { Answer } from './answers'
import { keep, read } from './storage'

/** A worked example. `key` tells apart two shots of the same picture. */
export type Shot = { key: string; picture: Picture; text: string }
export type Task = 'write' | 'choose'
export const METHODS = ['auto', 'in_context', 'nearest_mean', 'knn', 'linear', 'blend'] as const
export type Method = (typeof METHODS)[number]

export type Workspace = {
  shots: Shot[]
  /** How many of the shots the model is shown: the first ones. */
  shown: number
  queries: Picture[]
  /** The index of the query that is asked about. */
  query: number
  task: Task
  /** The sentence of a shot, with `{answer}` for its text. */
  pattern: string
  method: Method
  /** Pictures whose visual tokens are compared in Look inside. */
  compared: Picture[]
}

export const PATTERN = 'This is a {answer}.'
const MAX_ANSWERS = 200

export function emptyWorkspace(): Workspace {
  return {
    shots: [],
    shown: 0,
    queries: [],
    query: 0,
    task: 'write',
    pattern: PATTERN,
    method: 'auto',
    compared: [],
  }
}

export const workspace: Workspace = $state(emptyWorkspace())
/** The answers, by the key of the request that they answer. */
export const answers = new SvelteMap<string, Answer>()

/** Whether the kept workspace has been read, and the ids of pictures that are no longer on the server. */
export const kept = $state({ isRead: false, missing: {} as Record<string, true> })

type Stored = { workspace: Workspace; answers: [string, Answer][] }

export async function readWorkspace() {
  if (kept.isRead) return
  const stored = await read<Stored>()
  if (stored) Object.assign(workspace, stored.workspace)
  for (const [request, answer] of stored?.answers ?? []) answers.set(request, answer)
  kept.isRead = true
  checkPictures()
}

/** Notes which pictures the server has lost. */
export function checkPictures() {
  for (const { id } of pictures(workspace)) void checkPicture(id)
}

/** The browser may still have a picture that the server has not. A server that does not answer has lost none. */
async function checkPicture(id: string) {
  if (await isLost(id).catch(() => false)) kept.missing[id] = true
}

export async function keepWorkspace() {
  if (!kept.isRead) return
  const stored: Stored = { workspace: $state.snapshot(workspace), answers: [...answers] }
  await keep(stored)
}

function pictures({ shots, queries, compared }: Workspace): Picture[] {
  return [...shots.map((shot) => shot.picture), ...queries, ...compared]
}

/** Adds shots at the end, and shows the model all of them. Pictures from folders take turns by folder. */
export function addShots(pictures: Picture[]) {
  noteUploaded(pictures)
  const shots = takeTurns(pictures).map((picture) => ({ key: newKey(), picture, text: picture.folder }))
  workspace.shots.push(...shots)
  workspace.shown = workspace.shots.length
}

/** A picture that was missing has its old id when it is uploaded again. */
export function noteUploaded(pictures: Picture[]) {
  for (const { id } of pictures) delete kept.missing[id]
}

/** Orders pictures so that the first ones are of different folders: a few shots then show each label. */
function takeTurns(pictures: Picture[]): Picture[] {
  const seen = new Map<string, number>()
  const rounds = pictures.map((picture) => {
    const round = seen.get(picture.folder) ?? 0
    seen.set(picture.folder, round + 1)
    return { picture, round }
  })
  return rounds.sort((a, b) => a.round - b.round).map(({ picture }) => picture)
}

export function removeShot(index: number) {
  workspace.shots.splice(index, 1)
  if (index < workspace.shown) workspace.shown -= 1
}

/** Moves a shot; a position outside the list is the nearest one inside. Returns the position. */
export function moveShot(from: number, to: number): number {
  const target = Math.min(Math.max(to, 0), workspace.shots.length - 1)
  const [shot] = workspace.shots.splice(from, 1)
  workspace.shots.splice(target, 0, shot!)
  return target
}

/** Adds pictures to ask about, and asks about the first of them. */
export function addQueries(pictures: Picture[]) {
  noteUploaded(pictures)
  const added = pictures.filter(({ id }) => !workspace.queries.some((query) => query.id === id))
  workspace.queries.push(...added)
  workspace.query = workspace.queries.findIndex(({ id }) => id === pictures[0]?.id)
}

export function removeQuery(index: number) {
  workspace.queries.splice(index, 1)
  if (index < workspace.query || workspace.query === workspace.queries.length) workspace.query -= 1
  workspace.query = Math.max(0, workspace.query)
}

let numClears = 0

export function clearWorkspace() {
  numClears += 1
  Object.assign(workspace, emptyWorkspace())
}

/** Returns an action for the end of an upload: it does nothing if another prompt has replaced this one meanwhile. */
export function onThisPrompt(action: (pictures: Picture[]) => void): (pictures: Picture[]) => void {
  const own = numClears
  return (pictures) => {
    if (own === numClears) action(pictures)
  }
}

/** Keeps an answer, and forgets the oldest ones. */
export function keepAnswer(request: string, answer: Answer) {
  answers.set(request, answer)
  for (const oldest of [...answers.keys()].slice(0, -MAX_ANSWERS)) answers.delete(oldest)
}
