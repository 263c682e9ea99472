// The request that answers a query with the set as an evaluation recommends, or as the server chooses without one.
import type { ClassifyFields, Evaluation, QueryFields } from '../calls'
import type { TextForm } from '../texts'

export function classifyRequest(
  name: string,
  recommendation: Evaluation['recommendation'],
  texts: TextForm | null,
  query: QueryFields,
  targetAccuracy: number | null,
): ClassifyFields {
  return {
    ...(recommendation?.request ?? {
      examples: { support_set: name },
      ...(texts && { template: texts.template }),
    }),
    query,
    ...(targetAccuracy !== null && { target_accuracy: targetAccuracy }),
  }
}
