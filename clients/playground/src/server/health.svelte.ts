// The answers of /health and /version.
import { api, type Schemas } from '../api/client'
import { authorization } from '../api/key.svelte'

const PERIOD = 5_000

export class Health {
  health = $state.raw<Schemas['Health'] | null>(null)
  version = $state('')
  problem = $state<string | null>(null)

  /** Starts to ask, and returns the function that stops it. */
  watch(): () => void {
    const ask = () => void (document.hidden || this.#ask())
    ask()
    const timer = setInterval(ask, PERIOD)
    return () => clearInterval(timer)
  }

  /** A server that is not ready answers with 503 and the reason, which is no error here. */
  async #ask(): Promise<void> {
    try {
      const response = await fetch('/health', { headers: authorization() })
      const answer = await response.json()
      this.problem = 'status' in answer ? null : (answer.error?.message ?? `status ${response.status}`)
      this.health = 'status' in answer ? answer : null
      if (!this.version && this.health) this.version = (await api.GET('/version')).data!.version
    } catch {
      this.health = null
      this.problem = 'The server cannot be reached. Trying again …'
    }
  }
}
