"""`python -m tests.server.scripted_server` runs the server with a scripted engine in its worker."""

from __future__ import annotations

import asyncio
import sys

from server.settings import read_settings
from server.start import start
from server.telemetry import logs

if __name__ == "__main__":
    settings = read_settings(sys.argv[1:])
    logs.configure(settings.log_level, settings.log_format)
    sys.exit(asyncio.run(start(settings, factory="tests.server.scripted_engine:build")))
