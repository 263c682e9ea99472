// The HTTP API with the types of its OpenAPI document. A call returns `data`, or throws an `ApiError`.
import createClient from 'openapi-fetch'
import { send } from './request'
import type { components, paths } from './schema'

export type Schemas = components['schemas']

export const api = createClient<paths>({ baseUrl: '', fetch: send })
