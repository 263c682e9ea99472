// The storage of this site in the browser. A browser that blocks it, as it does with all cookies, keeps nothing.

type Kind = 'localStorage' | 'sessionStorage'

export function readStored(kind: Kind, name: string): string | null {
  try {
    return window[kind].getItem(name)
  } catch {
    return null
  }
}

/** Stores a text; null or a text that there is no room for removes the one before. */
export function store(kind: Kind, name: string, text: string | null) {
  try {
    if (text === null) window[kind].removeItem(name)
    else window[kind].setItem(name, text)
  } catch {
    if (text !== null) store(kind, name, null)
  }
}
