// Words for the settings of an evaluation.
import type { Schemas } from '../../api/client'

export type Row = Schemas['SummaryRow']
export type Method = Row['method']
export type Strategy = NonNullable<Row['strategy']>
export type Control = NonNullable<Row['control']>

export const METHODS: Record<Method, { name: string; explanation: string; colour: number }> = {
  nearest_mean: { name: 'Nearest mean', explanation: 'compares with the mean of each label’s examples', colour: 1 },
  knn: { name: 'Nearest neighbours', explanation: 'compares with the most similar examples of each label', colour: 2 },
  linear: { name: 'Logistic regression', explanation: 'fits a linear classifier to the image vectors', colour: 3 },
  in_context: { name: 'In context', explanation: 'the language model reads examples in its prompt', colour: 0 },
  blend: { name: 'Blend', explanation: 'in context and nearest mean together', colour: 4 },
}

export const STRATEGIES: Record<Strategy, string> = {
  random: 'random shots',
  rices_image: 'most similar images',
  balanced: 'as many of each label',
  first: 'first of the set',
  rices_text: 'most similar questions',
  mixed: 'similar images and questions',
}

export const CONTROLS: Record<Control, { name: string; explanation: string }> = {
  text_only: { name: 'Without images', explanation: 'Are the images read at all?' },
  shuffled_labels: { name: 'With shuffled labels', explanation: 'Do the labels of the shots matter?' },
}

export const DASHES: Partial<Record<Strategy, string>> = { rices_image: '6 4', rices_text: '2 4', mixed: '8 3 2 3' }

export const hasPrompt = (row: Pick<Row, 'k'>) => row.k !== null

/** Returns how a prompt is made: "4 random shots", or '' for a method without one. */
export function describeShots({ k, strategy, control }: Pick<Row, 'k' | 'strategy' | 'control'>): string {
  if (k === null) return ''
  const shots = k === 0 ? 'no shots' : `${k} ${k === 1 ? 'shot' : 'shots'}, ${STRATEGIES[strategy ?? 'first']}`
  return control ? `${shots}, ${CONTROLS[control].name.toLowerCase()}` : shots
}

/** Returns the whole setting in words: "In context, 4 shots, most similar images". */
export function describeRow(row: Pick<Row, 'method' | 'k' | 'strategy' | 'control'>): string {
  return [METHODS[row.method].name, describeShots(row)].filter(Boolean).join(', ')
}
