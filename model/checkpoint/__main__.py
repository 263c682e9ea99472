"""Convert a published checkpoint to a model folder.

python -m model.checkpoint import openflamingo --checkpoint FILE --language-model DIR --vision-model DIR \
    --cross-attn-every-n-layers N --out DIR
python -m model.checkpoint import idefics --from DIR --out DIR
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from model.checkpoint.idefics import import_idefics
from model.checkpoint.openflamingo import import_openflamingo
from model.config import ConfigError, FlamingoConfig
from model.folder import CheckpointError

DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None, prog: str = "python -m model.checkpoint") -> int:
    options = _parser(prog).parse_args(arguments)
    try:
        config = _import(options)
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    lm = config.language_model
    print(
        f"{options.out}: {config.family} model {config.name!r}, {lm.family} of {lm.num_layers} layers x {lm.dim}, "
        f"gated layers before {', '.join(map(str, config.gated_layers))}, {lm.num_token_ids} tokens"
    )
    return 0


def _import(options: argparse.Namespace) -> FlamingoConfig:
    if options.lineage == "idefics":
        return import_idefics(options.source, options.out, DTYPES[options.dtype])
    return import_openflamingo(
        checkpoint=options.checkpoint,
        language_model=options.language_model,
        vision_model=options.vision_model,
        every_n_layers=options.cross_attn_every_n_layers,
        out=options.out,
        dtype=DTYPES[options.dtype],
    )


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Model folders from checkpoints.")
    action = parser.add_subparsers(dest="action", required=True).add_parser("import", help="create a model folder")
    lineages = action.add_subparsers(dest="lineage", required=True)
    openflamingo = lineages.add_parser("openflamingo", help="a checkpoint.pt and the folders of its frozen models")
    openflamingo.add_argument(
        "--checkpoint", type=Path, required=True, help="checkpoint.pt, flat or from a training run"
    )
    openflamingo.add_argument("--language-model", type=Path, required=True, help="its Hugging Face folder")
    openflamingo.add_argument(
        "--vision-model", type=Path, required=True, help="an open_clip or Hugging Face CLIP folder"
    )
    openflamingo.add_argument("--cross-attn-every-n-layers", type=int, required=True, metavar="N")
    idefics = lineages.add_parser("idefics", help="a Hugging Face folder of IDEFICS (the first, not 2 or 3)")
    idefics.add_argument("--from", dest="source", type=Path, required=True, help="the Hugging Face folder")
    for lineage in (openflamingo, idefics):
        lineage.add_argument("--out", type=Path, required=True, help="the new folder; it must be empty or not exist")
        lineage.add_argument(
            "--dtype", choices=DTYPES, default="keep", help="dtype of the written weights (default: keep)"
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
