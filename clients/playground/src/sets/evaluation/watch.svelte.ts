// An evaluation that is asked for again until it has finished.
import { Watch } from '../../app/watch.svelte'
import { readEvaluation, type Evaluation } from '../calls'
import { isFinished } from './report'

export class WatchedEvaluation extends Watch {
  report = $state.raw<Evaluation | null>(null)

  constructor(readonly id: string) {
    super(async () => {
      if (!document.hidden || !this.report) this.report = await readEvaluation(id)
      return isFinished(this.report!)
    })
  }
}
