"""Build a model folder of one of the paper's models: `python -m model.presets build NAME --out DIR [--scale tiny]`.

The experts are random, or given as for `model.checkpoint join`; the bridge is the preset's. The whole model is held in
memory while it is built.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from model.checkpoint.named import describe_experts, fetch_language_model, open_language_model
from model.command import run
from model.config import FlamingoConfig
from model.folder import NO_FILES
from model.hub.inputs import fetch_vision_model, open_expert
from model.hub.job import SOURCE
from model.presets.build import build
from model.presets.paper import PRESETS, find_preset
from model.presets.scale import Scale, at_scale

BUILD = (
    "Write one of the paper's models as a model folder that is yet to be trained. Its experts have random weights, unless "
    "they are named. The whole model is held in memory."
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None, prog: str = "python -m model.presets") -> int:
    options = _parser(prog).parse_args(arguments)
    return run(partial(_create, options))


def _create(options: argparse.Namespace) -> str:
    """Create the folder and describe it in one line."""
    config = _build(options)
    note = "" if options.gate else ". The gates are closed: images have no effect until it is trained"
    layers = ", ".join(map(str, config.gated_layers))
    return f"{options.out}: {options.preset} at {options.scale} scale, gated layers before {layers}{note}"


def _build(options: argparse.Namespace) -> FlamingoConfig:
    preset = at_scale(find_preset(options.preset), options.scale)
    language_model = open_language_model(options.language_model) if options.language_model else None
    vision_model = open_expert(options.vision_model) if options.vision_model else None
    named = {"language model": language_model, "vision model": vision_model}
    sources = {part: source for part, source in named.items() if source is not None}
    return build(
        preset,
        options.out,
        language_model=fetch_language_model(language_model) if language_model else None,
        vision_model=fetch_vision_model(vision_model) if vision_model else None,
        dtype=DTYPES[options.dtype],
        gate=options.gate,
        files={SOURCE: describe_experts(sources).to_json()} if sources else NO_FILES,
    )


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Model folders of the paper's models.")
    actions = parser.add_subparsers(dest="action", required=True)
    action = actions.add_parser("build", help="create a model folder of a preset, yet to be trained", description=BUILD)
    action.add_argument("preset", metavar="NAME", help=f"one of {', '.join(PRESETS)}")
    action.add_argument(
        "--scale",
        choices=get_args(Scale),
        default="full",
        help="tiny: the same structure with small widths (default: %(default)s)",
    )
    action.add_argument("--language-model", help="an expert as for join (default: random weights)")
    action.add_argument("--vision-model", help="an expert as for join (default: random weights)")
    action.add_argument(
        "--gate",
        type=_finite,
        default=0.0,
        help="value of every gate; 0: closed, as in the paper (default: %(default)s)",
    )
    action.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="dtype of random weights (default: %(default)s)"
    )
    action.add_argument("--out", type=Path, required=True, help="the new folder; it must be empty or not exist")
    return parser


def _finite(text: str) -> float:
    if not abs(number := float(text)) <= torch.finfo(torch.bfloat16).max:
        raise argparse.ArgumentTypeError(f"{text} is not a valid value of a gate")
    return number


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())
