"""The files of weights in the model's folder and their SHA-256, which `GET /version` shows.

Files of gigabytes take seconds to read, so this begins when the engine is ready, and delays neither startup nor requests.
The digests are not stored, because the files could change after that.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from asyncio.subprocess import PIPE
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.settings import ROOT, child_environment
from server.signals import kill

POLL_SECONDS = 0.5
MODULE = "server.file_digests"

logger = logging.getLogger(__name__)


class Weights:
    """The files of weights of a folder, or none without a folder."""

    def __init__(self, folder: Path | None) -> None:
        self._sizes = {file: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))} if folder else {}
        self._digests: dict[Path, str] = {}

    def describe(self) -> list[dict[str, Any]]:
        return [
            {"file": file.name, "bytes": size, "sha256": self._digests.get(file)} for file, size in self._sizes.items()
        ]

    async def compute(self, is_ready: Callable[[], bool]) -> None:
        """Compute the digests as soon as the engine is ready; cancellation ends the process that does it."""
        if not self._sizes:
            return
        while not is_ready():
            await asyncio.sleep(POLL_SECONDS)
        try:
            await self._compute()
        except OSError as error:  # too many processes or files, or no memory for one more
            logger.warning("the digests of the weights are unknown", extra={"error": str(error)})

    async def _compute(self) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", MODULE, *map(str, self._sizes)),
            stdout=PIPE,
            cwd=ROOT,
            env=child_environment(),
            process_group=0,  # not a new session, in which its priority would have no effect
        )
        assert process.stdout is not None
        try:
            for file in self._sizes:
                if not (line := await process.stdout.readline()):  # it has printed why on stderr
                    return
                self._digests[file] = line.decode().strip()
        finally:
            kill(process)
            await process.wait()
