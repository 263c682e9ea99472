// Words for the settings of an evaluation.
import type { Schemas } from '../../api/client'

export type Row = Schemas['SummaryRow']
export type Recommendation = NonNullable<Schemas['EvaluationReport']['recommendation']>
export type Method = Row['method']
export type Strategy = NonNullable<Row['strategy']>
export type Control = NonNullable<Row['control']>
export type Form = NonNullable<Row['shots_attend']>

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

export const FORMS: Record<Form, { name: string; explanation: string }> = {
  previous: { name: 'Previous shots', explanation: 'each shot reads all shots before it' },
  alone: { name: 'Each alone', explanation: 'a shot reads no other, and is reused from the cache in any order' },
}

/** Each changes a setting of its method. */
export const CONTROLS: Record<Control, { name: string; explanation: string; method: Method }> = {
  text_only: { name: 'Without images', explanation: 'Are the images read at all?', method: 'in_context' },
  shuffled_labels: {
    name: 'With shuffled labels',
    explanation: 'Do the labels of the shots matter?',
    method: 'in_context',
  },
  encoder_features: {
    name: 'On plain features',
    explanation: 'Is nearest mean better than on the features of the encoder?',
    method: 'nearest_mean',
  },
}

const DASHES: Partial<Record<Strategy, string>> = { rices_image: '6 4', rices_text: '2 4', mixed: '8 3 2 3' }

/** Returns the dashes of a line: those of the strategy, with a dot if shots attend alone. */
export const dashOf = (strategy: Strategy, form: Form | null) =>
  [DASHES[strategy], form === 'alone' && '1 4'].filter(Boolean).join(' ') || undefined

export type Setting = Pick<Row, 'k' | 'strategy' | 'shots_attend' | 'control'>

export const hasPrompt = (row: Pick<Row, 'k'>) => row.k !== null

/** Returns how shots are chosen, and their form if each attends alone. */
export function describeChoice(strategy: Strategy, form: Form | null): string {
  return form === 'alone' ? `${STRATEGIES[strategy]}, ${FORMS.alone.name.toLowerCase()}` : STRATEGIES[strategy]
}

/** Returns how a prompt is made: "4 shots, random shots, each alone". A method without one has '' or its control. */
export function describeShots({ k, strategy, shots_attend, control }: Setting): string {
  const choice = describeChoice(strategy ?? 'first', shots_attend)
  const shots = k === null ? '' : k === 0 ? 'no shots' : `${k} ${k === 1 ? 'shot' : 'shots'}, ${choice}`
  return [shots, control && CONTROLS[control].name.toLowerCase()].filter(Boolean).join(', ')
}

/** Returns how the prompt of a recommendation is made. */
export const settingOf = ({ request: { examples, shots_attend } }: Recommendation): Setting => ({
  k: examples.k ?? null,
  strategy: examples.strategy ?? null,
  shots_attend: examples.k === undefined ? null : (shots_attend ?? 'previous'),
  control: null,
})

/** Returns the whole setting in words: "In context, 4 shots, most similar images". */
export function describeRow(row: Setting & Pick<Row, 'method'>): string {
  return [METHODS[row.method].name, describeShots(row)].filter(Boolean).join(', ')
}
