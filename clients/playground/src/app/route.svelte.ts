// The view that the address names: `#/sets/pets` is the view `sets` with the argument `pets`.

function read() {
  const [view = '', ...rest] = location.hash.replace(/^#\/?/, '').split('/')
  return { view: view || 'try', argument: decodeURIComponent(rest.join('/')) }
}

export const route = $state(read())

window.addEventListener('hashchange', () => Object.assign(route, read()))

export function go(view: string, argument = '') {
  location.hash = ['#', view, ...argument.split('/').filter(Boolean).map(encodeURIComponent)].join('/')
}
