// What the workspace asks now, with its answer. The views that show it call `followWorkspace` while they are open.
import { server } from '../app/server.svelte'
import { ask, asking, stopAsking } from './ask.svelte'
import { requestOf, whatIsMissing } from './prompt'
import { answers, keepWorkspace, kept, readWorkspace, workspace } from './workspace.svelte'

const PAUSE_BEFORE_KEEPING = 50

class Current {
  /** What is missing before it can be asked. */
  missing = $derived(whatIsMissing(workspace, kept.missing))
  request = $derived(requestOf(workspace, workspace.shown))
  key = $derived(this.request.key)
  answer = $derived(answers.get(this.key))
  error = $derived(asking.request === this.key ? asking.error : null)
  mustAsk = $derived(server.isReady && kept.isRead && !this.missing && !this.answer && !this.error)
}

export const current = new Current()

export function askCurrent() {
  void ask(current.request, workspace.shown)
}

/** Reads the kept workspace, asks what has no answer yet after a pause in milliseconds, and keeps what changes. */
export function followWorkspace(pause: () => number) {
  void readWorkspace()

  $effect(() => {
    void current.key
    if (!current.mustAsk) return
    const timer = setTimeout(askCurrent, pause())
    return () => clearTimeout(timer)
  })

  // what is asked no more is not computed to its end
  $effect(() => {
    void current.key
    return stopAsking
  })

  // a server that is ready again is asked again
  $effect(() => {
    if (!server.isReady) return stopAsking
  })

  $effect(() => {
    void [JSON.stringify(workspace), answers.size]
    const timer = setTimeout(keepWorkspace, PAUSE_BEFORE_KEEPING)
    return () => clearTimeout(timer)
  })

  // what was changed just before the view, or the page, is left
  $effect(() => {
    const keep = () => void keepWorkspace()
    window.addEventListener('pagehide', keep)
    return () => {
      window.removeEventListener('pagehide', keep)
      keep()
    }
  })
}
