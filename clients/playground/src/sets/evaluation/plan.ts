// The request of an evaluation: what the form offers for a set, and what is sent.
import type { EvaluateFields, Example } from '../calls'
import { answerOf, groupByLabel } from '../openSet.svelte'
import { areTextsAlone, textForm } from '../texts'
import { CONTROLS, METHODS, type Control, type Form, type Method, type Strategy } from './names'

const SHOTS = [0, 1, 2, 4, 8, 16]
const MAX_LINEAR = 512

export type Plan = {
  methods: Method[]
  shots: number[]
  strategies: Strategy[]
  forms: Form[]
  controls: Control[]
  numSeeds: number
  maxQueries: number
}

/** Returns why a method cannot answer with these examples, or null. */
export function obstacle(method: Method, examples: Example[]): string | null {
  if (method === 'in_context') return null
  if (examples.some(({ media }) => !media.length)) return 'needs a picture in each example'
  const counts = [...groupByLabel(examples).values()].map(({ length }) => length)
  // texts may be answers of their own, and labels are classes
  const areLabelled = examples.every(({ label }) => label)
  if (!areLabelled && counts.some((count) => count < 2)) return 'needs two examples of each text'
  if (counts.filter((count) => count > 1).length < 2) return 'needs two labels with two examples each'
  return method === 'linear' && examples.length > MAX_LINEAR ? `takes at most ${MAX_LINEAR} examples` : null
}

/** Returns the methods that the set allows. */
export function possibleMethods(examples: Example[]): Method[] {
  return (Object.keys(METHODS) as Method[]).filter((method) => !obstacle(method, examples))
}

/** Returns the numbers of shots that leave one example for the query. */
export const possibleShots = (examples: Example[]) => SHOTS.filter((k) => k < examples.length)

export function defaultPlan(examples: Example[]): Plan {
  const hasMedia = examples.every(({ media }) => media.length)
  return {
    methods: possibleMethods(examples),
    shots: possibleShots(examples),
    strategies: hasMedia ? ['random', 'rices_image'] : ['random'],
    forms: ['previous'],
    controls: [],
    numSeeds: 1,
    maxQueries: 200,
  }
}

/** Returns why the set cannot be evaluated, or null. */
export function refusal(examples: Example[]): string | null {
  if (examples.length < 2) return 'An evaluation needs at least two examples.'
  const missing = examples.filter((example) => !answerOf(example)).length
  if (missing) return `${missing} ${missing === 1 ? 'example has' : 'examples have'} no label or text to be right.`
  return areTextsAlone(examples) && !textForm(examples)
    ? 'Without pictures, each example needs a question, or a text and a label.'
    : null
}

/** Returns the controls of these methods. */
export const possibleControls = (methods: Method[]) =>
  (Object.keys(CONTROLS) as Control[]).filter((control) => methods.includes(CONTROLS[control].method))

const chosenControls = ({ methods, controls }: Plan) =>
  possibleControls(methods).filter((control) => controls.includes(control))

/** Returns the number of settings, and of the answers that they need in all. */
export function size(plan: Plan, examples: Example[]): { settings: number; answers: number } {
  const prompted = plan.methods.filter((method) => method === 'in_context' || method === 'blend').length
  const withShots = plan.shots.filter((k) => k > 0).length * plan.strategies.length * plan.forms.length * plan.numSeeds
  const prompts = withShots + (plan.shots.includes(0) ? 1 : 0) // without shots, nothing is chosen
  const settings = prompted * prompts + (plan.methods.length - prompted) + chosenControls(plan).length
  return { settings, answers: settings * Math.min(examples.length, plan.maxQueries) }
}

/**
 * Methods are named only if possible ones are left out. Without names, the server recommends nothing if it cannot measure
 * those that compare pictures.
 */
export function request(plan: Plan, version: number, examples: Example[]): EvaluateFields {
  const hasAll = possibleMethods(examples).every((method) => plan.methods.includes(method))
  const isPrompted = plan.methods.some((method) => method === 'in_context' || method === 'blend')
  const texts = textForm(examples)
  return {
    version,
    ...(texts && { template: texts.template }),
    ...(!hasAll && { methods: plan.methods }),
    max_queries: plan.maxQueries,
    seeds: Array.from({ length: plan.numSeeds }, (_, seed) => seed),
    controls: chosenControls(plan),
    ...(isPrompted && { k: plan.shots, strategies: plan.strategies, shots_attend: plan.forms }),
  }
}
