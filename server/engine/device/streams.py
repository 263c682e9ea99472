"""A second CUDA stream, concurrent with the current one; a CPU has none and works in program order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """A stream whose work may run at the same time as that of the current stream, unless one waits for the other."""

    def __init__(self, device: torch.device) -> None:
        self._stream = None if device.type == "cpu" else torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event | None:
        """Return a mark at the end of the current stream's work so far; None on a CPU."""
        return None if self._stream is None else torch.cuda.current_stream().record_event()

    def wait(self, mark: torch.cuda.Event) -> None:
        """Let the current stream wait for a mark before its next work; the host does not wait."""
        torch.cuda.current_stream().wait_event(mark)

    @contextmanager
    def after(self, mark: torch.cuda.Event | None) -> Iterator[None]:
        """Let the work of a block run on this stream, as the current one, after a mark."""
        if self._stream is None or mark is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self.wait(mark)
            yield
