// The metrics of the last two minutes, asked for while the view is visible, and what they say per second.
import { authorization } from '../api/key.svelte'
import { parseMetrics, type Metrics } from './metrics'

export const WINDOW = 120
const PERIOD = 2_000

export type Sample = { time: number; metrics: Metrics }
export type Value = { time: number; value: number }

export class Samples {
  all = $state.raw<Sample[]>([])
  /** Why there are no metrics, for the person. */
  problem = $state<string | null>(null)
  readonly latest = $derived(this.all.at(-1)?.metrics ?? new Map<string, number>())

  /** Starts to ask, and returns the function that stops it. */
  watch(): () => void {
    const ask = () => void (document.hidden || this.#ask())
    ask()
    const timer = setInterval(ask, PERIOD)
    return () => clearInterval(timer)
  }

  gauge(name: string): Value[] {
    return this.all.map(({ time, metrics }) => ({ time, value: metrics.get(name) ?? 0 }))
  }

  /** Returns the increase of a counter per second between two samples. A counter that fell belongs to a new process. */
  rate(name: string): Value[] {
    return this.all.slice(1).map(({ time, metrics }, index) => {
      const before = this.all[index]!
      const increase = (metrics.get(name) ?? 0) - (before.metrics.get(name) ?? 0)
      return { time, value: Math.max(increase, 0) / (time - before.time) }
    })
  }

  /** Returns the increase of a counter over the whole window. */
  increase(name: string): number {
    return Math.max((this.latest.get(name) ?? 0) - (this.all[0]?.metrics.get(name) ?? 0), 0)
  }

  /** Returns the mean of a histogram's values in the window, or null if there were none. */
  mean(name: string): number | null {
    const count = this.increase(`${name}_count`)
    return count ? this.increase(`${name}_sum`) / count : null
  }

  async #ask(): Promise<void> {
    try {
      const response = await fetch('/metrics', { headers: authorization() })
      this.problem = response.ok ? null : explain(response.status)
      if (response.ok) this.#add(parseMetrics(await response.text()))
    } catch {
      this.problem = 'The server cannot be reached. Trying again …'
    }
  }

  #add(metrics: Metrics): void {
    const time = performance.now() / 1000
    this.all = [...this.all.filter((sample) => sample.time > time - WINDOW), { time, metrics }]
  }
}

function explain(status: number): string {
  if (status === 401 || status === 403) return 'You are not permitted to read /metrics here, so there is no live data.'
  if (status === 404) return '/metrics is not available at this address, so there is no live data.'
  return `/metrics answers with status ${status}. Trying again …`
}
