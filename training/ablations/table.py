"""The table of ablations shows each change, the paper's score next to its base, and our score next to our base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from training.ablations.ablation import Ablation

HEAD = ("ablation", "paper: overall (its base)", "change", "accuracy", "change", "loss", "change", "s per step")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    ablation: str
    steps: int
    seconds: float
    accuracy: float
    loss: float


def format_table(results: Sequence[Result], ablations: Sequence[Ablation], base: str) -> str:
    """Return the table in Markdown; changes are relative to the result named `base`, if there is one."""
    by_name = {result.ablation: result for result in results}
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for result, ablation in zip(results, ablations, strict=True):
        lines.append("| " + " | ".join(_row(result, ablation, by_name.get(base))) + " |")
    return "\n".join(lines)


def _row(result: Result, ablation: Ablation, base: Result | None) -> tuple[str, ...]:
    paper = ablation.paper
    is_base = base is None or result is base
    return (
        ablation.description,
        f"{paper.overall:.1f} ({paper.base:.1f})" if paper else "",
        f"{paper.change:+.1f}" if paper else "",
        f"{100 * result.accuracy:.1f}",
        "" if is_base or base is None else f"{100 * (result.accuracy - base.accuracy):+.1f}",
        f"{result.loss:.3f}",
        "" if is_base or base is None else f"{result.loss - base.loss:+.3f}",
        f"{result.seconds / result.steps:.2f}",
    )
