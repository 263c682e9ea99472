"""A run as people see it: one line that moves, with rates and the time left, and TensorBoard's curves beside it.

Losses of every set, the gradient's norm, the learning rate, and each gated layer's gates.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard.writer import SummaryWriter

from model.flamingo import Flamingo
from training.step import StepReport


class Watch:
    """`with Watch(...)`: `step` after each step. Processes other than the first show nothing."""

    def __init__(self, folder: Path, total: int, done: int, shown: bool) -> None:
        self._writer = SummaryWriter(str(folder / "tensorboard")) if shown else None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.2f} steps/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not shown,
        )
        self._task = self._progress.add_task("training", total=total, completed=done, rate=0.0)
        self._seconds = 0.0

    def __enter__(self) -> Watch:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._writer is not None:
            self._writer.close()

    def step(self, report: StepReport) -> None:
        self._seconds = report.seconds if not self._seconds else 0.9 * self._seconds + 0.1 * report.seconds
        losses = " ".join(f"{name} {loss:.3f}" for name, loss in report.losses.items())
        self._progress.update(
            self._task, completed=report.step + 1, description=losses, rate=1 / max(self._seconds, 1e-9)
        )
        if self._writer is not None:
            self._write(self._writer, report)

    def gates(self, model: Flamingo, step: int) -> None:
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
    """Mean |tanh(gate)| of every gate, by its name."""
    gates = {name: value for name, value in model.named_parameters() if name.endswith("_gate")}
    whole = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in gates.items()}
    return {name: float(value.detach().float().tanh().abs().mean()) for name, value in whole.items()}
