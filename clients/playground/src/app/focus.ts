// The focus, when the element that has it is removed: it goes to the innermost element around it that is still there.
// Without this, it goes to the body, and the keyboard or a screen reader is at the beginning of the page.

/** Keeps the focus within an element, and returns the function that stops it. */
export function keepFocus(root: HTMLElement): () => void {
  /** The element that has the focus, and those around it. */
  let path: HTMLElement[] = []

  function enter(event: FocusEvent) {
    const around = event.composedPath().filter((node) => node instanceof HTMLElement)
    path = around.slice(0, around.indexOf(root) + 1)
  }

  /** An element that loses the focus and stays has not lost it by its removal. */
  function leave() {
    const left = path
    setTimeout(() => {
      if (path === left && left[0]?.isConnected && document.activeElement !== left[0]) path = []
    })
  }

  const observer = new MutationObserver(() => {
    if (document.activeElement !== document.body || !path.length || path[0]!.isConnected) return
    const near = path.find(({ isConnected }) => isConnected)
    path = []
    if (near) focus(near)
  })

  root.addEventListener('focusin', enter)
  root.addEventListener('focusout', leave)
  observer.observe(root, { childList: true, subtree: true })
  return () => {
    root.removeEventListener('focusin', enter)
    root.removeEventListener('focusout', leave)
    observer.disconnect()
  }
}

/** Focuses an element, also one that takes no focus otherwise. */
function focus(element: HTMLElement) {
  if (!element.hasAttribute('tabindex')) {
    element.tabIndex = -1
    element.addEventListener('blur', () => element.removeAttribute('tabindex'), { once: true })
  }
  element.focus({ preventScroll: true })
}
