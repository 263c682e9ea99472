// The API key of this tab. It is kept in the session storage, so it ends with the tab, and goes to this server alone.

const NAME = 'flamboyance-api-key'

export const key = $state({ value: sessionStorage.getItem(NAME) ?? '', isNeeded: false, numRefusals: 0 })

export function setKey(value: string) {
  key.value = value
  key.isNeeded = false
  if (value) sessionStorage.setItem(NAME, value)
  else sessionStorage.removeItem(NAME)
}

/** The header that sends the key, if there is one. */
export function authorization(): Record<string, string> {
  return key.value ? { Authorization: `Bearer ${key.value}` } : {}
}
