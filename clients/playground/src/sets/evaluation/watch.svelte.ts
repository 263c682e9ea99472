// An evaluation that is asked for again until it has finished, also if the server is away for a while.
import { ApiError, messageOf } from '../../api/errors'
import { readEvaluation, type Evaluation } from '../calls'
import { isFinished } from './report'

const PERIOD = 700
/** The statuses of refusals that no other try changes: the evaluation is gone, or the key is wrong. */
const FINAL = [401, 403, 404]

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
    let isDone = false
    try {
      if (!document.hidden || !this.report) this.report = await readEvaluation(this.id)
      this.error = null
      isDone = isFinished(this.report!)
    } catch (error) {
      this.error = messageOf(error)
      isDone = error instanceof ApiError && FINAL.includes(error.status)
    }
    if (!isDone && !this.#isStopped) this.#timer = setTimeout(() => void this.#ask(), PERIOD)
  }
}
