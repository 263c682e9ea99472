// Something that is asked for again until it has ended, also if the server is away for a while.
import { ApiError, messageOf } from '../api/errors'

const PERIOD = 700
/** The statuses of refusals that no other try changes: what is asked for is gone, or the key is wrong. */
const FINAL = [401, 403, 404]

export class Watch {
  error = $state<string | null>(null)
  #timer: ReturnType<typeof setTimeout> | undefined
  #isStopped = false

  /** `ask` returns whether what it asks for has ended. */
  constructor(readonly ask: () => Promise<boolean>) {}

  /** Starts to ask, and returns the function that stops it. */
  start(): () => void {
    this.#isStopped = false
    void this.#askAgain()
    return () => {
      this.#isStopped = true
      clearTimeout(this.#timer)
    }
  }

  async #askAgain(): Promise<void> {
    let hasEnded = false
    try {
      hasEnded = await this.ask()
      this.error = null
    } catch (error) {
      this.error = messageOf(error)
      hasEnded = error instanceof ApiError && FINAL.includes(error.status)
    }
    if (!hasEnded && !this.#isStopped) this.#timer = setTimeout(() => void this.#askAgain(), PERIOD)
  }
}
