// Rows of links that scroll sideways, which a phone has no room for otherwise.

/** Scrolls a row to the link of what is shown. The page itself stays where it is. */
export function reveal(row: HTMLElement) {
  const link = row.querySelector('[aria-current]')
  if (!link) return
  const [outer, inner] = [row.getBoundingClientRect(), link.getBoundingClientRect()]
  row.scrollLeft += Math.min(0, inner.left - outer.left) + Math.max(0, inner.right - outer.right)
}
