"""A run's progress is a status line in the terminal, with rates and the remaining time, and curves in TensorBoard.

If the output is no terminal, the progress is a line of the log every 30 seconds. The curves are every set's loss, the
gradient norm, the learning rate, the tokens per second and each layer's gates.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from model.config import ConfigError
from model.flamingo import Flamingo
from training.bridge import gather
from training.step import StepReport

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

# between two lines of the log
LINE_SECONDS = 30.0

log = logging.getLogger(__name__)


def _open_curves(folder: Path) -> SummaryWriter:
    """Raises `ConfigError` if TensorBoard, which is in an extra, is not installed."""
    try:
        writer = import_module("torch.utils.tensorboard.writer")
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed, install the extra: pip install '.[training]'") from None
    opened: SummaryWriter = writer.SummaryWriter(str(folder))
    return opened


class ProgressReporter:
    """A context manager whose `report_step` is called after each step; only the first process enables it."""

    def __init__(self, folder: Path, num_steps: int, num_steps_done: int, *, enabled: bool) -> None:
        is_terminal = get_console().is_terminal
        self._writer = _open_curves(folder / "tensorboard") if enabled else None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.2f} steps/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not enabled or not is_terminal,
        )
        self._is_logged = enabled and not is_terminal
        self._last_line = -math.inf
        self._num_steps = num_steps
        self._task = self._progress.add_task("training", total=num_steps, completed=num_steps_done, rate=0.0)
        self._seconds = 0.0

    def __enter__(self) -> ProgressReporter:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._writer is not None:
            self._writer.close()

    def report_step(self, report: StepReport) -> None:
        self._seconds = report.seconds if not self._seconds else 0.9 * self._seconds + 0.1 * report.seconds
        num_steps_done = report.step + 1
        losses = " ".join(f"{name} {loss:.3f}" for name, loss in report.losses.items())
        self._progress.update(
            self._task, completed=num_steps_done, description=losses, rate=1 / max(self._seconds, 1e-9)
        )
        if self._is_logged and (self._is_line_due() or num_steps_done == self._num_steps):
            remaining = timedelta(seconds=round(self._seconds * (self._num_steps - num_steps_done)))
            step = f"step {num_steps_done} of {self._num_steps}"
            log.info("%s: %s, %.2f s per step, %s remaining", step, losses, self._seconds, remaining)
        if self._writer is not None:
            self._write(self._writer, report)

    def _is_line_due(self) -> bool:
        """Return whether the last line is old enough; the step of this call then has a line."""
        if (now := time.monotonic()) - self._last_line < LINE_SECONDS:
            return False
        self._last_line = now
        return True

    def report_gates(self, gates: Mapping[str, float], step: int) -> None:
        if self._writer is not None:
            for name, value in gates.items():
                self._writer.add_scalar(f"gates/{name}", value, step)

    def _write(self, writer: SummaryWriter, report: StepReport) -> None:
        for name, loss in report.losses.items():
            writer.add_scalar(f"loss/{name}", loss, report.step)
        writer.add_scalar("gradient_norm", report.gradient_norm, report.step)
        writer.add_scalar("learning_rate", report.learning_rate, report.step)
        writer.add_scalar("tokens_per_second", report.num_tokens / max(report.seconds, 1e-9), report.step)


def gate_values(model: Flamingo) -> dict[str, float]:
    """Return the mean |tanh(gate)| of every gate by its name; all processes must call this together."""
    gates = {name: gather(value) for name, value in model.named_parameters() if name.endswith("_gate")}
    return {name: float(value.detach().float().tanh().abs().mean()) for name, value in gates.items()}
