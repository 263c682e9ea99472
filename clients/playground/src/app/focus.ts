// The focus, when the element that has it is removed: it goes to the innermost element around it that is still there. An
// element that is disabled for a while, such as the button of an action that runs, has the focus again when it is enabled,
// unless the person has gone on meanwhile. Without this, it goes to the body, and the keyboard or a screen reader is at the
// beginning of the page.

const ACTIONS = ['keydown', 'pointerdown'] as const

/** Keeps the focus within an element, and returns the function that stops it. */
export function keepFocus(root: HTMLElement): () => void {
  /** The element in `root` that has or has lost the focus, and those around it. */
  let path: HTMLElement[] = []
  let isDisabled = false

  function enter(event: FocusEvent) {
    const around = event.composedPath().filter((node) => node instanceof HTMLElement)
    path = around.slice(0, around.indexOf(root) + 1)
    isDisabled = false
  }

  /** An element that loses the focus, and stays as it is, has not lost it by its removal. */
  function leave() {
    const left = path
    setTimeout(() => {
      const [element] = left
      const isLeft = element?.isConnected && !element.matches(':disabled') && document.activeElement !== element
      if (path === left && isLeft) path = []
    })
  }

  /** Who presses or clicks something after the focus was lost has gone on. */
  function goOn(event: Event) {
    const isHeld = event instanceof KeyboardEvent && event.repeat
    if (!isHeld && document.activeElement !== path[0]) path = []
  }

  const observer = new MutationObserver(() => {
    const wasDisabled = isDisabled
    isDisabled = path[0]?.matches(':disabled') ?? false
    if (document.activeElement !== document.body || !path.length) return
    if (wasDisabled && !isDisabled && path[0]!.isConnected) path[0]!.focus({ preventScroll: true })
    if (path[0]!.isConnected) return
    const near = path.find(({ isConnected }) => isConnected)
    path = []
    if (near) focus(near)
  })

  // the focus may also leave `root`
  document.addEventListener('focusin', enter)
  for (const type of ACTIONS) document.addEventListener(type, goOn, true)
  root.addEventListener('focusout', leave)
  observer.observe(root, { childList: true, subtree: true, attributeFilter: ['disabled'] })
  return () => {
    document.removeEventListener('focusin', enter)
    for (const type of ACTIONS) document.removeEventListener(type, goOn, true)
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
