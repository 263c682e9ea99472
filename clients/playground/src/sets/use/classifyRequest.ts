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
    ...(recommendation?.request ?? { examples: { support_set: name } }),
    query: { media: [part(query)] },
    ...(targetAccuracy !== null && { target_accuracy: targetAccuracy }),
  }
}
