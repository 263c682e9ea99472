// The API key of this tab. It is kept in the session storage, so it ends with the tab, and goes to this server alone.
import { readStored, store } from '../app/siteStorage'

const NAME = 'flamboyance-api-key'

export const key = $state({ value: readStored('sessionStorage', NAME) ?? '', isNeeded: false, numRefusals: 0 })

export function setKey(value: string) {
  key.value = value
  key.isNeeded = false
  store('sessionStorage', NAME, value || null)
}

/** The header that sends the key, if there is one. */
export function authorization(): Record<string, string> {
  return key.value ? { Authorization: `Bearer ${key.value}` } : {}
}
