"""Stores on disk which weight formats were measured as the fastest, so that the next start does not measure again.

There is one file per model and machine. Its name and its content identify the processor, the number of threads, the
versions of torch and of the measured code, and the configuration of the model. A file that is damaged or belongs to another
machine is ignored and replaced. A measurement made while other programs used the processor may be wrong: it is kept for an
hour, so that a replaced worker need not measure again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from kernels.compiled import DIGEST
from model import cpu, products
from model.config import FlamingoConfig
from model.cpu import ENCODER_ROWS, ROWS, Choice, Choices
from model.products import Format

CPUINFO = Path("/proc/cpuinfo")
# a measurement that had less than this share of its threads' time is kept for this number of seconds
DISTURBED_SECONDS = 3600.0
MIN_PROCESSOR_SHARE = 0.6
PROCESSOR_FIELDS = ("model name", "cpu family", "model", "stepping", "flags", "Features", "CPU part")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FormatMemory:
    file: Path
    identity: dict[str, Any]
    clock: Callable[[], float] = time.time

    @classmethod
    def of(cls, folder: Path, config: FlamingoConfig) -> FormatMemory:
        identity = {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "code": _digest(DIGEST.encode() + Path(cpu.__file__).read_bytes() + Path(products.__file__).read_bytes()),
            "instructions": products.instruction_names(),
            "model": _digest(config.to_json().encode()),
        }
        name = _digest(json.dumps(identity).encode())
        # a name on a Hub has a slash
        return cls(folder / f"{config.name.replace('/', '--')}-{name}.json", identity)

    def load(self) -> Choices:
        """Return the stored choices, {} if there is no valid file."""
        return self._read()[0]

    def _read(self) -> tuple[Choices, float | None]:
        """Return the stored choices, and when they expire."""
        try:
            content = json.loads(self.file.read_bytes())
            if content["identity"] != self.identity:
                raise ValueError("it belongs to another machine, model or version")
            if (expires := content.get("expires")) is not None and self.clock() >= expires:
                return {}, None
            return {key: _choice(key, formats) for key, formats in content["formats"].items()}, expires
        except FileNotFoundError:
            return {}, None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("remembered weight formats are ignored", extra={"error": str(error)})
            return {}, None

    def save(self, choices: Choices, *, is_disturbed: bool = False) -> None:
        """Add choices to the file; those with other formats of the same model stay until they expire."""
        known, expires = self._read()
        if choices.items() <= known.items():
            return
        if is_disturbed and expires is None:
            expires = self.clock() + DISTURBED_SECONDS
        content = json.dumps({"identity": self.identity, "expires": expires, "formats": known | choices}, indent=1)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            _replace(self.file, content)
        except OSError as error:
            logger.warning("measured weight formats could not be stored", extra={"error": str(error)})


@dataclass(frozen=True, slots=True)
class ProcessorTime:
    """Measures the time since its creation, and how much of it the threads of this process ran."""

    began: float = field(default_factory=time.perf_counter)
    used: float = field(default_factory=time.process_time)

    def is_disturbed(self, num_threads: int) -> bool:
        """Return whether other programs used much of the time that `num_threads` threads could have run."""
        seconds = time.perf_counter() - self.began
        return time.process_time() - self.used < MIN_PROCESSOR_SHARE * num_threads * seconds


def processor() -> str:
    """Return a text that identifies the processor, including its instruction sets."""
    try:
        first = CPUINFO.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        first = ""
    fields = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
    described = [value.strip() for name, value in fields.items() if name.strip() in PROCESSOR_FIELDS]
    return " ".join([platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability(), *described])


def _choice(key: str, formats: dict[str, str]) -> Choice:
    """Return the formats of one key by number of rows. Raises `ValueError` if they are not those of a measurement."""
    names = key.rpartition(" of ")[2].split("/")
    choice: dict[int, Any] = {int(rows): name for rows, name in formats.items()}
    is_complete = tuple(choice) in (ROWS, (ENCODER_ROWS,))
    if not is_complete or not set(choice.values()) <= set(names) & set(get_args(Format)):
        raise ValueError(f"{key} has no formats {formats}")
    return choice


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _replace(file: Path, content: str) -> None:
    """Write a file that is either complete or as it was before."""
    handle, partial = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(content)
        os.replace(partial, file)
    except OSError:
        with suppress(OSError):
            os.unlink(partial)
        raise
