// The view that the address names: `#/sets/pets` is the view `sets` with the argument `pets`.

function read() {
  const [view = '', ...rest] = location.hash.replace(/^#\/?/, '').split('/')
  return { view: view || 'try', argument: rest.map(decode).join('/') }
}

/** Addresses are typed and shared by people: what cannot be decoded is left as it is. */
function decode(part: string): string {
  try {
    return decodeURIComponent(part)
  } catch {
    return part
  }
}

export const route = $state(read())

let numMoves = 0
window.addEventListener('hashchange', () => {
  numMoves += 1
  Object.assign(route, read())
})

export function go(view: string, argument = '') {
  location.hash = ['#', view, ...argument.split('/').filter(Boolean).map(encodeURIComponent)].join('/')
}

/** Returns the entry that an address names. Names that every object has, such as `constructor`, are none. */
export function entry<Item>(entries: Record<string, Item>, name: string): Item | undefined {
  return Object.hasOwn(entries, name) ? entries[name] : undefined
}

/**
 * Returns a `go` for the end of something long: it does nothing if the person has gone elsewhere meanwhile, also if they
 * came back.
 */
export function goUnlessLeft(): typeof go {
  const [start, numBefore] = [location.hash, numMoves]
  return (view, argument) => {
    if (location.hash === start && numMoves === numBefore) go(view, argument)
  }
}
