// Builds the page into the server's static files. While developing, the routes of a running server are proxied.
import { svelte } from '@sveltejs/vite-plugin-svelte'
import { defineConfig } from 'vite'

const server = process.env.FLAMBOYANCE_URL ?? 'http://127.0.0.1:8000'

export default defineConfig({
  base: '/playground/',
  plugins: [svelte()],
  build: {
    outDir: process.env.OUT_DIR ?? '../../server/api/static/playground',
    emptyOutDir: true,
    target: 'es2022',
    assetsInlineLimit: 0, // the policy of the page permits no data: scripts or fonts
    modulePreload: { polyfill: false },
  },
  server: {
    proxy: Object.fromEntries(
      ['/v1', '/health', '/metrics', '/version', '/tokenize', '/openapi.json'].map((path) => [path, server]),
    ),
  },
})
