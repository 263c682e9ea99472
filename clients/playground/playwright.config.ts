// Tests of the page against a real server with the default model, in Debian's Chromium.
import { defineConfig } from '@playwright/test'

const PORT = process.env.PLAYGROUND_PORT ?? '18090'
const python = process.env.PYTHON ?? '../../.venv/bin/python'

export default defineConfig({
  testDir: 'tests',
  workers: 1,
  // generous: the model shares its cores with the browser
  timeout: 240_000,
  expect: { timeout: 60_000 },
  reporter: 'list',
  use: {
    baseURL: `http://127.0.0.1:${PORT}`,
    viewport: { width: 1280, height: 860 },
    launchOptions: {
      executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
      args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--disable-background-networking', '--disable-sync'],
    },
  },
  webServer: {
    command: `sh -c 'd=$(mktemp -d); trap "rm -rf $d" EXIT; cd ../.. && ${python.replace('../../', '')} -m server --port ${PORT} --data-dir $d'`,
    url: `http://127.0.0.1:${PORT}/health/ready`,
    timeout: 300_000,
    gracefulShutdown: { signal: 'SIGTERM', timeout: 20_000 },
  },
})
