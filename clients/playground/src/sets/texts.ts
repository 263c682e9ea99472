// Sets of texts alone: the server's own templates all show a picture.
import type { Example } from './calls'

export type TextForm = { field: 'question' | 'text'; template: { shot: string } }

const FORMS: TextForm[] = [
  { field: 'question', template: { shot: 'Question: {question} Answer: {label}' } },
  { field: 'text', template: { shot: 'Input: {text} Output: {label}' } },
]

export const areTextsAlone = (examples: Example[]) =>
  examples.length > 0 && examples.every(({ media }) => !media.length)

/** Returns the field and the template of texts alone that have an answer beside them, or null for any other set. */
export function textForm(examples: Example[]): TextForm | null {
  if (!areTextsAlone(examples)) return null
  const hasField = ({ field }: TextForm) =>
    examples.every((example) => example[field] && (field === 'question' || example.label))
  return FORMS.find(hasField) ?? null
}
