// Requests about support sets and evaluations. Lists are read to their last page.
import { api, type Schemas } from '../api/client'

export type SetInfo = Schemas['SupportSet']
export type Example = Schemas['StoredExample']
export type Evaluation = Schemas['EvaluationReport']
export type EvaluationHead = Schemas['EvaluationHead']

type Optional<Body> = Body extends (infer Item)[]
  ? Optional<Item>[]
  : Body extends object
    ? { [Field in keyof Body]?: Optional<Body[Field]> }
    : Body

/** Returns a request body. Fields with a default may be left out, which the generated types do not permit. */
const body = <Body>(fields: Optional<Body>) => fields as never

export type NewExample = Optional<Schemas['ExampleFields']>
export type QueryFields = Optional<Schemas['QueryFields']>
export type EvaluateFields = Optional<Schemas['EvaluateRequest']>
export type ClassifyFields = Optional<Schemas['ClassifyRequest']>

/** Calls `read` with the last id of each page, until there is no further one. */
async function readPages<Item, Cursor = string>(
  read: (after?: Cursor) => Promise<{ data: Item[]; has_more: boolean; last: Cursor | null }>,
): Promise<Item[]> {
  const items: Item[] = []
  let after: Cursor | undefined
  for (;;) {
    const page = await read(after)
    items.push(...page.data)
    if (!page.has_more || page.last === null) return items
    after = page.last
  }
}

export function listSets(): Promise<SetInfo[]> {
  return readPages(async (after) => {
    const { data } = await api.GET('/v1/support_sets', { params: { query: { limit: 1000, after } } })
    return { ...data!, last: data!.last_id }
  })
}

export async function readSet(name: string): Promise<SetInfo> {
  const { data } = await api.GET('/v1/support_sets/{support_set}', { params: { path: { support_set: name } } })
  return data!
}

export async function firstExamples(name: string, limit: number): Promise<Example[]> {
  const params = { path: { support_set: name }, query: { limit } }
  const { data } = await api.GET('/v1/support_sets/{support_set}/examples', { params })
  return data!.data
}

export function readExamples(name: string, version: number): Promise<Example[]> {
  return readPages(async (after) => {
    const params = { path: { support_set: name }, query: { limit: 1000, version, after } }
    const { data } = await api.GET('/v1/support_sets/{support_set}/examples', { params })
    return { ...data!, last: data!.last_id }
  })
}

/** Creates a set, once for each idempotency key. */
export async function createSet(name: string, examples: NewExample[], key: string): Promise<SetInfo> {
  const { data } = await api.POST('/v1/support_sets', {
    params: { header: { 'Idempotency-Key': key } },
    body: body<Schemas['CreateRequest']>({ name, examples }),
  })
  return data!
}

export async function deleteSet(name: string): Promise<void> {
  await api.DELETE('/v1/support_sets/{support_set}', { params: { path: { support_set: name } } })
}

/** Adds examples, once for each idempotency key. */
export async function addExamples(name: string, examples: NewExample[], key: string): Promise<void> {
  await api.POST('/v1/support_sets/{support_set}/examples', {
    params: { path: { support_set: name }, header: { 'Idempotency-Key': key } },
    body: body<Schemas['PutExamplesRequest']>({ examples }),
  })
}

/** Replaces examples with the same ids. Fails if `version` is no longer the latest. */
export async function putExamples(name: string, examples: NewExample[], version: number): Promise<void> {
  await api.POST('/v1/support_sets/{support_set}/examples', {
    params: { path: { support_set: name } },
    body: body<Schemas['PutExamplesRequest']>({ examples, expected_version: version }),
  })
}

/** Removes examples in one version. Fails if `version` is no longer the latest. */
export async function removeExamples(name: string, version: number, ids: string[]): Promise<void> {
  await api.DELETE('/v1/support_sets/{support_set}/examples', {
    params: { path: { support_set: name }, query: { id: ids.join(','), expected_version: version } },
  })
}

export function readVersions(name: string): Promise<Schemas['Version'][]> {
  return readPages<Schemas['Version'], number>(async (after) => {
    const params = { path: { support_set: name }, query: { limit: 1000, after } }
    const { data } = await api.GET('/v1/support_sets/{support_set}/versions', { params })
    return { ...data!, last: data!.data.at(-1)?.version ?? null }
  })
}

export async function warm(name: string): Promise<SetInfo> {
  const params = { path: { support_set: name } }
  const { data } = await api.POST('/v1/support_sets/{support_set}/warm', {
    params,
    body: body<Schemas['WarmRequest']>({}),
  })
  return data!
}

export async function search(name: string, query: QueryFields, k: number): Promise<Schemas['SimilarExample'][]> {
  const { data } = await api.POST('/v1/support_sets/{support_set}/search', {
    params: { path: { support_set: name } },
    body: body<Schemas['SearchRequest']>({ query, k }),
  })
  return data!.data
}

export async function diagnose(name: string, version: number): Promise<Schemas['Diagnostics']> {
  const { data } = await api.GET('/v1/support_sets/{support_set}/diagnostics', {
    params: { path: { support_set: name }, query: { version } },
  })
  return data!
}

export function listEvaluations(name: string): Promise<EvaluationHead[]> {
  return readPages(async (after) => {
    const params = { query: { support_set: name, limit: 100, after } }
    const { data } = await api.GET('/v1/evaluations', { params })
    return { ...data!, last: data!.last_id }
  })
}

export async function evaluate(name: string, fields: EvaluateFields): Promise<Evaluation> {
  const params = { path: { support_set: name } }
  const request = body<Schemas['EvaluateRequest']>(fields)
  const { data } = await api.POST('/v1/support_sets/{support_set}/evaluate', { params, body: request })
  return data as Evaluation
}

export async function readEvaluation(id: string): Promise<Evaluation> {
  const { data } = await api.GET('/v1/evaluations/{evaluation_id}', { params: { path: { evaluation_id: id } } })
  return data as Evaluation
}

export async function cancelEvaluation(id: string): Promise<void> {
  await api.POST('/v1/evaluations/{evaluation_id}/cancel', { params: { path: { evaluation_id: id } } })
}

export async function deleteEvaluation(id: string): Promise<void> {
  await api.DELETE('/v1/evaluations/{evaluation_id}', { params: { path: { evaluation_id: id } } })
}

export async function classify(fields: ClassifyFields): Promise<Schemas['Classification']> {
  const { data } = await api.POST('/v1/classify', { body: body<Schemas['ClassifyRequest']>(fields) })
  return data!
}
