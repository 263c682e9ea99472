"""A run's progress is a status line in the terminal, with rates and the remaining time, and curves in TensorBoard.

The curves are every set's loss, the gradient norm, the learning rate, the tokens per second and each layer's gates.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard.writer import SummaryWriter

from model.flamingo import Flamingo
from training.bridge import gather
from training.step import StepReport


class ProgressReporter:
    """A context manager whose `report_step` is called after each step; only the first process enables it."""

    def __init__(self, folder: Path, num_steps: int, num_steps_done: int, *, enabled: bool) -> None:
        self._writer = SummaryWriter(str(folder / "tensorboard")) if enabled else None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.2f} steps/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not enabled,
        )
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
        losses = " ".join(f"{name} {loss:.3f}" for name, loss in report.losses.items())
        self._progress.update(
            self._task, completed=report.step + 1, description=losses, rate=1 / max(self._seconds, 1e-9)
        )
        if self._writer is not None:
            self._write(self._writer, report)

    def report_gates(self, model: Flamingo, step: int) -> None:
        if self._writer is not None:
            for name, value in gate_values(model).items():
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
