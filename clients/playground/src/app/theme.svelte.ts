// Light or dark: as the system says, unless the person has chosen.

import { readStored, store } from './siteStorage'

export type Theme = 'system' | 'light' | 'dark'
const NAME = 'flamboyance-theme'

export const theme = $state({ value: (readStored('localStorage', NAME) ?? 'system') as Theme })

export function setTheme(value: Theme) {
  theme.value = value
  store('localStorage', NAME, value)
  apply()
}

function apply() {
  if (theme.value === 'system') delete document.documentElement.dataset.theme
  else document.documentElement.dataset.theme = theme.value
}

apply()
