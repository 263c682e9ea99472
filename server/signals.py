"""The signals that end the server."""

from __future__ import annotations

import signal


def ending_signals() -> list[signal.Signals]:
    """Return SIGTERM, SIGINT and SIGHUP, which a closed terminal sends; without SIGHUP if it is ignored, as by `nohup`."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if is_ignored else [signal.SIGHUP])]
