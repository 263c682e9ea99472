// What a dropped folder says about the set that is made of it.
import type { Dropped } from '../../media/pictures'

/** Returns the number of files of each subfolder, in the order of the files. Files outside of them count under ''. */
export function countByFolder(files: Dropped[]): Map<string, number> {
  const counts = new Map<string, number>()
  for (const { folder } of files) counts.set(folder, (counts.get(folder) ?? 0) + 1)
  return counts
}

/** Returns a name that a set may have: that of the folder that was dropped, or `fallback`. */
export function suggestName(files: Dropped[], fallback = 'my-set'): string {
  return asName(files[0]?.root ?? '', fallback)
}

/** Returns a text with the characters that names may have: letters without accents, and `-` for other characters. */
export function asName(text: string, fallback = 'my-set'): string {
  const letters = text.replace(/ß/g, 'ss').normalize('NFKD').replace(/\p{M}/gu, '')
  const name = letters.replace(/[^\w.:-]+/g, '-').replace(/^[_.:-]+/, '')
  return name.slice(0, 128) || fallback
}

/** Returns `name`, or the first of `name-2`, `name-3` and so on that is not taken. */
export function untaken(name: string, taken: (string | null)[]): string {
  let candidate = name
  for (let number = 2; taken.includes(candidate); number += 1) candidate = `${name}-${number}`
  return candidate
}
