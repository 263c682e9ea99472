// Where a value of this page is kept: in the session of its tab, which other tabs do not write to. New tabs start with the
// value that was kept last by any tab, unless a key is in use: the key ends with its tab, and so does what was done with it.
import { get, set } from 'idb-keyval'
import { key } from '../api/key.svelte'
import { readStored, store } from '../app/siteStorage'

const NAME = 'flamboyance-workspace'
let kept: string | null = null
let isForgotten = false

export async function read<Value>(): Promise<Value | undefined> {
  kept = readStored('sessionStorage', NAME)
  if (kept) return JSON.parse(kept)
  return key.value ? undefined : get<Value>(NAME).catch(() => undefined) // private windows may have no store
}

/** Keeps a value if it is another one. A tab that only looks on overwrites nothing. */
export async function keep(value: object): Promise<void> {
  const text = JSON.stringify(value)
  if (text === kept || isForgotten) return
  kept = text
  store('sessionStorage', NAME, text) // a value that the session has no room for is kept for new tabs only
  if (!key.value) await set(NAME, value).catch(() => undefined)
}

/** Forgets what the tab has, before the page is loaded again with another key. */
export function forget() {
  isForgotten = true
  store('sessionStorage', NAME, null)
}
