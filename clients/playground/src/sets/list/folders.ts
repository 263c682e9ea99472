// What a dropped folder says about the set that is made of it.
import type { Dropped } from '../../media/pictures'

/** Returns the number of files of each folder, in the order of the files. Files outside folders count under ''. */
export function countByFolder(files: Dropped[]): Map<string, number> {
  const counts = new Map<string, number>()
  for (const { folder } of files) counts.set(folder, (counts.get(folder) ?? 0) + 1)
  return counts
}

/** Returns a name that a set may have: the outermost folder of the files, or `fallback`. */
export function suggestName(files: Dropped[], fallback = 'my-set'): string {
  const file = files[0]?.file as (File & { path?: string; relativePath?: string }) | undefined
  const path = (file?.relativePath ?? file?.path ?? '').replace(/^\.?\//, '').split('/')
  return path.length > 2 ? asName(path[0]!, fallback) : fallback
}

/** Returns a text with the characters that names may have. */
export function asName(text: string, fallback = 'my-set'): string {
  return text.replace(/[^\w.:-]+/g, '-').replace(/^[^A-Za-z0-9]+|-+$/g, '') || fallback
}

/** Returns `name`, or the first of `name-2`, `name-3` and so on that is not taken. */
export function untaken(name: string, taken: (string | null)[]): string {
  let candidate = name
  for (let number = 2; taken.includes(candidate); number += 1) candidate = `${name}-${number}`
  return candidate
}
