// The pictures of the documentation: `make pictures` writes them to docs/images.
import { defineConfig } from '@playwright/test'
import tests from './playwright.config'

export default defineConfig({ ...tests, testDir: 'pictures' })
