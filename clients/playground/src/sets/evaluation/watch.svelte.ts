// An evaluation that is asked for again until it has finished.
import { messageOf } from '../../api/errors'
import { readEvaluation, type Evaluation } from '../calls'
import { isFinished } from './report'

const PERIOD = 700

export class WatchedEvaluation {
  report = $state.raw<Evaluation | null>(null)
  error = $state<string | null>(null)
  #timer: ReturnType<typeof setTimeout> | undefined
  #isStopped = false

  constructor(readonly id: string) {}

  /** Starts to ask, and returns the function that stops it. */
  start(): () => void {
    this.#isStopped = false
    void this.#ask()
    return () => {
      this.#isStopped = true
      clearTimeout(this.#timer)
    }
  }

  async #ask(): Promise<void> {
    try {
      if (!document.hidden || !this.report) this.report = await readEvaluation(this.id)
      this.error = null
    } catch (error) {
      this.error = messageOf(error)
    }
    const isDone = this.report ? isFinished(this.report) : this.error !== null
    if (!isDone && !this.#isStopped) this.#timer = setTimeout(() => void this.#ask(), PERIOD)
  }
}
