"""The pictures of docs/paper.md, drawn from the finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes

from evaluation.paper.claims import attention_gates, clip_shares
from evaluation.paper.evidence import ALL_PREVIOUS, CLIPS, LAST, Evidence, values
from training.ablations.ablation import BASE
from training.few_shot.clips import CONDITIONS
from training.few_shot.images import SHOTS, WAYS
from training.few_shot.motions import FAMILIES

# so that equal data give equal files
STYLE: Any = {"svg.hashsalt": "paper", "svg.fonttype": "none", "font.size": 9}
METADATA = {"Date": None, "Creator": None}


def draw_pictures(evidence: Evidence, folder: Path) -> None:
    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        _draw_curve(evidence, folder / "curve.svg")
        _draw_gates(evidence, folder / "gates.svg")
        _draw_clips(evidence, folder / "clips.svg")


def _save(file: Path) -> None:
    pyplot.tight_layout()
    pyplot.savefig(file, metadata=METADATA)
    pyplot.close()


def _draw_curve(evidence: Evidence, file: Path) -> None:
    _, panel = pyplot.subplots(figsize=(6, 3.4))
    positions = range(len(SHOTS))
    for name in (LAST, ALL_PREVIOUS):
        measured = [values(evidence.shares(name, str(count))) for count in SHOTS]
        if present := [value for value in measured if value]:
            lows, highs = zip(*(value.interval() for value in present), strict=True)
            (line,) = panel.plot(positions, [value.mean for value in present], marker="o", label=name)
            panel.fill_between(positions, lows, highs, alpha=0.2, color=line.get_color())
    if evidence.shots:
        shares = [100 * digits.count("1") / len(digits) for digits in evidence.shots.values()]
        panel.plot([SHOTS.index(int(count)) for count in evidence.shots], shares, marker="s", label="default model")
    if evidence.few_shot[LAST]:
        limit = SHOTS.index(evidence.published["max_media"] - 1)
        panel.axvline(limit, color="grey", linestyle=":", label=f"most shots in the training of {LAST}")
    panel.axhline(100 / WAYS, color="grey", linewidth=0.8)
    panel.set(xlabel="shots", ylabel="accuracy, %", ylim=(0, 100), xticks=list(positions), xticklabels=list(SHOTS))
    _legend(panel)
    _save(file)


def _draw_gates(evidence: Evidence, file: Path) -> None:
    names = [name for name in (BASE, LAST, CLIPS) if evidence.gates(name)] or [BASE]
    _, panels = pyplot.subplots(1, len(names), figsize=(3 * len(names), 3), sharey=True, squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        for gates in list(evidence.gates(name).values())[:1]:
            for layer, openness in attention_gates(gates).items():
                panel.plot(gates["steps"], openness, label=f"before layer {layer}")
        panel.set(title=name, xlabel="step", ylabel="|tanh(gate)|")
        _legend(panel)
    _save(file)


def _draw_clips(evidence: Evidence, file: Path) -> None:
    _, panel = pyplot.subplots(figsize=(7, 3.2))
    width = 0.8 / len(CONDITIONS)
    for number, condition in enumerate(CONDITIONS):
        measured = [values(clip_shares(evidence, family)[condition]) for family in FAMILIES]
        heights = [value.mean if value else 0.0 for value in measured]
        positions = [family + (number - 2) * width for family in range(len(FAMILIES))]
        panel.bar(positions, heights, width, label=condition)
    panel.axhline(50, color="grey", linewidth=0.8)
    panel.set(ylabel="accuracy, %", ylim=(0, 100), xticks=range(len(FAMILIES)), xticklabels=FAMILIES)
    panel.legend(ncols=3, fontsize=7, loc="lower center")
    _save(file)


def _legend(panel: Axes) -> None:
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=7)
