// Light or dark: as the system says, unless the person has chosen.

export type Theme = 'system' | 'light' | 'dark'
const NAME = 'flamboyance-theme'

export const theme = $state({ value: (localStorage.getItem(NAME) ?? 'system') as Theme })

export function setTheme(value: Theme) {
  theme.value = value
  localStorage.setItem(NAME, value)
  apply()
}

function apply() {
  if (theme.value === 'system') delete document.documentElement.dataset.theme
  else document.documentElement.dataset.theme = theme.value
}

apply()
