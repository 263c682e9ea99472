// What the views of an evaluation's report need of it.
import type { Schemas } from '../../api/client'
import type { Series } from '../../charts/lines'
import type { Evaluation } from '../calls'
import { dashOf, describeChoice, hasPrompt, METHODS, settingOf } from './names'
import type { Method, Row, Setting, Strategy } from './names'

export type Cell = Schemas['CompletedCell']
export type FailedCell = Schemas['FailedCell']

export const isFinished = ({ status }: Pick<Evaluation, 'status'>) => status !== 'queued' && status !== 'running'
export const chance = ({ labels }: Evaluation) => 1 / Math.max(labels.length, 1)
export const failedCells = ({ cells }: Evaluation) =>
  cells.filter((cell): cell is FailedCell => cell.status === 'failed')
const isSame = (one: Setting, other: Setting) =>
  one.k === other.k &&
  one.strategy === other.strategy &&
  one.shots_attend === other.shots_attend &&
  one.control === other.control
const withoutControl = (rows: Row[]) => rows.filter(({ control }) => control === null)

/** Returns the most accurate row of each method, the most accurate method first. */
export function bestRows({ summary }: Evaluation): Row[] {
  const best = new Map<Method, Row>()
  for (const row of withoutControl(summary)) {
    const other = best.get(row.method)
    if (!other || row.accuracy > other.accuracy) best.set(row.method, row)
  }
  return [...best.values()].sort((a, b) => b.accuracy - a.accuracy)
}

/** Returns the recommended row, or the most accurate one if none is recommended. */
export function recommendedRow(report: Evaluation): Row | undefined {
  const chosen = report.recommendation
  const row =
    chosen && report.summary.find((row) => row.method === chosen.request.method && isSame(row, settingOf(chosen)))
  return row ?? bestRows(report)[0]
}

/** Returns the cell of a row's best seed. */
export function cellOf({ cells }: Evaluation, row: Row): Cell | undefined {
  return cells.find(
    (cell): cell is Cell =>
      cell.status === 'completed' && cell.method === row.method && isSame(cell, row) && cell.seed === row.best_seed,
  )
}

/** Returns the accuracy by number of shots, a series per method, strategy and form. All begin at the same prompt without shots. */
export function shotSeries({ summary }: Evaluation): Series[] {
  const rows = withoutControl(summary).filter(hasPrompt)
  const shown = rows.filter(({ k }) => k !== 0)
  const all = (shown.length ? shown : rows).map(
    (row) => [`${row.method} ${row.strategy} ${row.shots_attend}`, row] as const,
  )
  return [...new Map(all).values()].map(({ method, strategy, shots_attend }) => ({
    name: `${METHODS[method].name}, ${describeChoice(strategy as Strategy, shots_attend)}`,
    colour: METHODS[method].colour,
    dash: dashOf(strategy as Strategy, shots_attend),
    points: rows
      .filter(
        (row) =>
          row.method === method && (row.k === 0 || (row.strategy === strategy && row.shots_attend === shots_attend)),
      )
      .map(({ k, accuracy, accuracy_interval: [low, high] }) => ({ x: k!, y: accuracy, low, high })),
  }))
}

/** Returns the accuracy of answers by their confidence, of the bins that have answers. */
export function calibrationSeries({ bins }: Cell): Series {
  const points = bins.filter(({ count }) => count).map(({ confidence, accuracy }) => ({ x: confidence!, y: accuracy! }))
  return { name: 'Accuracy', colour: 0, points }
}

/** Returns the accuracy of the surest answers by their share of all. */
export function coverageSeries({ curve }: Cell): Series[] {
  const points = [...curve].sort((a, b) => a.coverage - b.coverage)
  return [
    { name: 'Accuracy', colour: 0, points: points.map(({ coverage, accuracy }) => ({ x: coverage, y: accuracy })) },
    {
      name: 'Mean confidence',
      colour: 1,
      dash: '6 4',
      points: points.map(({ coverage, confidence }) => ({ x: coverage, y: confidence })),
    },
  ]
}

/** Returns the right label and the other answer that it got most often, or undefined if all answers are right. */
export function commonestMistake({ confusion }: Cell): { right: string; answered: string } | undefined {
  const mistakes = Object.entries(confusion).flatMap(([right, counts]) =>
    Object.entries(counts)
      .filter(([answered, count]) => answered !== right && count)
      .map(([answered, count]) => ({ right, answered, count })),
  )
  return mistakes.sort((one, other) => other.count - one.count)[0]
}

/** Returns the left-out examples of one cell of the confusion matrix: those with this right label and this answer. */
export function confusedExamples(
  { left_out }: Evaluation,
  cell: Cell,
  rightAnswers: Map<string, string>,
  right: string,
  answered: string,
): string[] {
  return left_out.filter((id, index) => rightAnswers.get(id) === right && cell.answers?.[index] === answered)
}
