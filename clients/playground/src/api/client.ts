// The HTTP API with the types of its OpenAPI document. A call returns `data`, or throws an `ApiError`.
import createClient from 'openapi-fetch'
import { throwUnlessOk } from './errors'
import { authorization } from './key.svelte'
import type { components, paths } from './schema'

export type Schemas = components['schemas']

export const api = createClient<paths>({ baseUrl: '' })

api.use({
  onRequest({ request }) {
    for (const [name, value] of Object.entries(authorization())) request.headers.set(name, value)
    return request
  },
  async onResponse({ response }) {
    await throwUnlessOk(response)
    return response
  },
})
