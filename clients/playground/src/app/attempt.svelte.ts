// An action that a person has started: whether it runs, and how it failed.
import { messageOf } from '../api/errors'

export class Attempt {
  isRunning = $state(false)
  error = $state<string | null>(null)

  #latest = 0
  #action: (() => Promise<void>) | undefined

  /** Runs an action. If another one is started meanwhile, that one's state is shown. */
  async run(action: () => Promise<void>): Promise<void> {
    const own = ++this.#latest
    this.#action = action
    this.isRunning = true
    this.error = null
    try {
      await action()
    } catch (error) {
      if (own === this.#latest) this.error = messageOf(error)
    } finally {
      if (own === this.#latest) this.isRunning = false
    }
  }

  /** Runs the last action again. */
  async again(): Promise<void> {
    if (this.#action) await this.run(this.#action)
  }
}
