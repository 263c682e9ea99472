// The request that answers a query with the set as an evaluation recommends, or as the server chooses without one.
import { part, type Picture } from '../../media/pictures'
import type { ClassifyFields, Evaluation } from '../calls'

export function classifyRequest(
  name: string,
  recommendation: Evaluation['recommendation'],
  query: Picture,
  targetAccuracy: number | null,
): ClassifyFields {
  return {
    ...how(name, recommendation),
    query: { media: [part(query)] },
    ...(targetAccuracy !== null && { target_accuracy: targetAccuracy }),
  }
}

/** A method without a prompt has no temperature to send: each request fits its own. */
function how(name: string, recommendation: Evaluation['recommendation']): ClassifyFields {
  if (!recommendation) return { examples: { support_set: name } }
  const { accuracy, accuracy_interval, reason, temperature, ...fields } = recommendation
  return { ...fields, ...(temperature !== null && { temperature }) }
}
