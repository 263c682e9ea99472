"""Count parameters by part, frozen and trainable, next to published figures: `python -m model.describe NAME|FOLDER ...`.

Models are built on the meta device, without weights. A mark notes figures that do not follow from the paper's own table of
layers and widths.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from model.config import ConfigError, FlamingoConfig, load_config
from model.flamingo import Flamingo
from model.presets import DOES_NOT_FOLLOW, NOTES, PRESETS, PUBLISHED

PARTS = {"language_model": "frozen", "vision": "frozen", "gated": "trainable", "resampler": "trainable"}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def parameters(config: FlamingoConfig) -> dict[str, int]:
    """Return the number of parameters by part; rows of new tokens count as the language model's."""
    with torch.device("meta"):
        model = Flamingo(config)
    return {part: count(getattr(model, part)) for part in PARTS}


def rows(config: FlamingoConfig) -> Iterator[tuple[str, str, str, str, str]]:
    published = PUBLISHED.get(config.name)
    for part, number in parameters(config).items():
        stated = getattr(published, part) if published else None
        mark = DOES_NOT_FOLLOW.get((config.name, part), "")
        yield (
            part,
            PARTS[part],
            f"{number / 1e6:,.1f}",
            f"{stated / 1e6:,.0f}{mark}" if stated else "-",
            f"{number / stated:.2f}" if stated else "-",
        )


def table(config: FlamingoConfig) -> str:
    head = ("part", "weights", "parameters (M)", "published (M)", "ratio")
    body = list(rows(config))
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in [head, *body]
    ]
    marks = [mark for (name, _), mark in DOES_NOT_FOLLOW.items() if name == config.name]
    notes = [f"{mark.strip()} {NOTES[mark]}" for mark in marks]
    return "\n".join([f"{config.name}: gated layers before {list(config.gated_layers)}", *lines, *notes])


def find(name: str) -> FlamingoConfig:
    if name in PRESETS:
        return PRESETS[name]
    if Path(name).is_dir():
        return load_config(Path(name))
    raise ConfigError(f"{name!r} is neither a model folder nor one of {', '.join(PRESETS)}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model.describe", description=__doc__)
    parser.add_argument("names", nargs="*", default=list(PRESETS), metavar="NAME|FOLDER")
    try:
        print("\n\n".join(table(find(name)) for name in parser.parse_args().names))
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
