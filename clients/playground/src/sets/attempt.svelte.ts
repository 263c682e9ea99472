// An action that a person has started: whether it runs, and how it failed.
import { messageOf } from '../api/errors'

export class Attempt {
  isRunning = $state(false)
  error = $state<string | null>(null)

  async run(action: () => Promise<void>): Promise<void> {
    this.isRunning = true
    this.error = null
    try {
      await action()
    } catch (error) {
      this.error = messageOf(error)
    } finally {
      this.isRunning = false
    }
  }
}
