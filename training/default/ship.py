"""Write the last stage's bridge to `model/zoo/` with 8 bits per weight, and plot the curves of all stages.

`python -m training.default.ship RUN ...` takes the stages' run folders. `model.zoo` joins the bridge to the experts; the
plots are stored next to it for the model card.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot

from model.config import FlamingoConfig, load_config
from model.folder import load_folder
from model.kin import COMPONENTS
from model.zoo import default
from model.zoo.bridge import save_bridge
from model.zoo.default import BRIDGE, DEFAULT
from training.bridge import is_bridge

MAX_SMOOTHING = 10.0  # log lines per running mean; a tenth of the lines if the run is short


def ship(run: Path, file: Path) -> int:
    """Write a run's bridge to the file, with the directions of kin, and return the file's size in bytes."""
    model = load_folder(run / "model", "cpu", torch.float32)
    tensors = model.state_dict().items()
    save_bridge(file, {name: tensor for name, tensor in tensors if is_bridge(name) or name == COMPONENTS})
    return file.stat().st_size


def changes(before: FlamingoConfig, after: FlamingoConfig) -> list[str]:
    """Return the fields that differ between two configurations, with their path and new value, except the models' names."""
    return [
        f"{part.name}.{field.name} = {new}"
        for part in dataclasses.fields(before)
        if dataclasses.is_dataclass(old_part := getattr(before, part.name))
        for field in dataclasses.fields(old_part)
        if (new := getattr(getattr(after, part.name), field.name)) != getattr(old_part, field.name)
    ]


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the log with one line per step: the last one, since a resumed run repeats steps after its checkpoint."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return sorted({line["step"]: line for line in lines}.values(), key=lambda line: line["step"])


def draw(runs: list[Path], folder: Path) -> None:
    """Plot the losses of all stages, one panel per stage, and the last stage's gates by layer."""
    figure, panels = pyplot.subplots(1, len(runs), figsize=(5 * len(runs), 3.5), squeeze=False)
    for panel, run in zip(panels[0], runs, strict=True):
        lines = read_log(run)
        for name in lines[0]["losses"]:
            values = [line["losses"][name] for line in lines]
            panel.plot([line["step"] for line in lines], values, alpha=0.3)
            panel.plot([line["step"] for line in lines], smooth(values), label=name)
        panel.set(title=run.name, xlabel="step", ylabel="loss")
        panel.legend()
    figure.tight_layout()
    figure.savefig(folder / "loss.png", dpi=90)
    _draw_gates(read_log(runs[-1]), folder / "gates.png")


def _draw_gates(lines: list[dict[str, Any]], file: Path) -> None:
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.5), sharey=True)
    for panel, kind in zip(panels, ("attn_gate", "ffw_gate"), strict=True):
        for name in lines[0]["gates"]:
            if name.endswith(kind):
                panel.plot([x["step"] for x in lines], [x["gates"][name] for x in lines], label=name.split(".")[1])
        panel.set(title=kind, xlabel="step", ylabel="|tanh(gate)|")
        panel.legend(title="before layer", fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(file, dpi=90)


def smooth(values: list[float]) -> list[float]:
    """Return an exponential running mean that starts at the first value."""
    weight = 1 / min(MAX_SMOOTHING, max(1.0, len(values) / 10))
    means = values[:1]
    for value in values[1:]:
        means.append((1 - weight) * means[-1] + weight * value)
    return means


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.default.ship", description=__doc__)
    parser.add_argument("run", type=Path, nargs="+", help="the stages' run folders, in their order")
    options = parser.parse_args()
    matplotlib.use("agg")
    runs = [run.expanduser() for run in options.run]
    size = ship(runs[-1], BRIDGE)
    draw(runs, BRIDGE.parent)
    print(f"{BRIDGE}: {size / 1e6:.1f} MB")
    for change in changes(DEFAULT, load_config(runs[-1] / "model")):
        print(f"change {inspect.getfile(default)}: the bridge was trained with {change}")


if __name__ == "__main__":
    main()
