"""Create a model folder: convert a published checkpoint, or join two frozen experts with an untrained bridge.

python -m model.checkpoint import NAME [--cache DIR]
python -m model.checkpoint import openflamingo --checkpoint FILE --language-model DIR --vision-model DIR \
    --cross-attn-every-n-layers N --out DIR
python -m model.checkpoint import idefics --from DIR --out DIR
python -m model.checkpoint join --language-model DIR --vision-model DIR [--cross-attn-every N] --out DIR

NAME is a repository of a Hugging Face Hub, `OWNER/NAME` or `OWNER/NAME@REVISION`, or a downloaded folder. Its model folder
is created in the cache unless it exists, and its path is printed. A FILE or DIR that is read may also be a repository.
In `join`, `default` stands for an expert of the default model, and the language model may be a GGUF file.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from model.cache import cache_folder
from model.checkpoint.idefics import import_idefics
from model.checkpoint.join import BridgeSizes, join
from model.checkpoint.named import describe_experts, fetch_language_model, open_language_model
from model.checkpoint.openflamingo import import_openflamingo
from model.command import run
from model.config import FlamingoConfig
from model.hub.inputs import describe, fetch_checkpoint, fetch_model, fetch_vision_model, open_expert
from model.hub.job import SOURCE
from model.hub.prepare import prepare
from model.hub.sources import LocalFolder, Source, open_source

DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LINEAGES = ("openflamingo", "idefics")

IMPORT = (
    "Convert a checkpoint to a model folder. With the name of a model in place of a format, convert it into the cache."
)
IMPORT_NAME = "Convert a model into the cache, downloaded first, unless it is there, and print the path of its folder."
OPENFLAMINGO = "Convert an OpenFlamingo checkpoint and its two frozen models to a model folder."
IDEFICS = "Convert an IDEFICS checkpoint to a model folder."
JOIN = (
    "Join a frozen language model and a frozen vision encoder to a model folder with an untrained bridge. Its gates are "
    "closed: images have no effect until it is trained."
)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m model.checkpoint") -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["import"] and words[1:2] and words[1] not in (*LINEAGES, "-h", "--help"):
        named = _parse_name(words[1:], f"{prog} import")
        return run(partial(prepare, named.name, named.cache))
    return run(partial(_create, _parser(prog).parse_args(words)))


def _create(options: argparse.Namespace) -> str:
    """Create the folder and describe it in one line."""
    if options.action == "import":
        return _summary(options.out, _import(options))
    return f"{_summary(options.out, _join(options))}. The gates are closed: images have no effect until it is trained"


def _summary(folder: Path, config: FlamingoConfig) -> str:
    lm = config.language_model
    return (
        f"{folder}: {config.family} model {config.name!r}, {lm.family} of {lm.num_layers} layers x {lm.dim}, "
        f"gated layers before {', '.join(map(str, config.gated_layers))}, {lm.num_token_ids} tokens"
    )


def _import(options: argparse.Namespace) -> FlamingoConfig:
    if options.lineage == "idefics":
        source = open_source(options.source)
        files = {SOURCE: describe({"model": source}).to_json()}
        return import_idefics(fetch_model(source), options.out, DTYPES[options.dtype], files=files)
    checkpoint, file = _open_checkpoint(options.checkpoint)
    language_model, vision_model = open_source(options.language_model), open_source(options.vision_model)
    origin = describe({"checkpoint": checkpoint, "language model": language_model, "vision model": vision_model})
    return import_openflamingo(
        checkpoint=file or fetch_checkpoint(checkpoint),
        language_model=fetch_model(language_model),
        vision_model=fetch_vision_model(vision_model),
        every_n_layers=options.cross_attn_every_n_layers,
        out=options.out,
        dtype=DTYPES[options.dtype],
        files={SOURCE: origin.to_json()},
    )


def _join(options: argparse.Namespace) -> FlamingoConfig:
    sizes = BridgeSizes(
        cross_attn_every=options.cross_attn_every,
        num_latents=options.num_latents,
        resampler_layers=options.resampler_layers,
        resampler_dim=options.resampler_dim,
    )
    language_model, vision_model = open_language_model(options.language_model), open_expert(options.vision_model)
    origin = describe_experts({"language model": language_model, "vision model": vision_model})
    return join(
        language_model=fetch_language_model(language_model),
        vision_model=fetch_vision_model(vision_model),
        sizes=sizes,
        out=options.out,
        files={SOURCE: origin.to_json()},
    )


def _open_checkpoint(text: str) -> tuple[Source, Path | None]:
    """Return the source of a checkpoint, and its file if `text` is a file of any name."""
    file = Path(text)
    return (LocalFolder(file.parent), file) if file.is_file() else (open_source(text), None)


def _parse_name(words: Sequence[str], prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description=IMPORT_NAME)
    parser.add_argument("name", metavar="NAME", help="OWNER/NAME or OWNER/NAME@REVISION on the Hub, or a folder")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        default=cache_folder(),
        help="folder of model folders (default: ~/.cache/flamboyance)",
    )
    options, unknown = parser.parse_known_args(words)
    if unknown:
        formats = " and ".join(f"import {lineage}" for lineage in LINEAGES)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; {formats} have other options than import NAME")
    return options


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Model folders from checkpoints.")
    actions = parser.add_subparsers(dest="action", required=True)
    _add_join(
        actions.add_parser(
            "join", help="create a model folder from two frozen experts, with closed gates", description=JOIN
        )
    )
    usage = f"{prog} import [-h] NAME [--cache DIR]\n       {prog} import {{{','.join(LINEAGES)}}} ..."
    action = actions.add_parser(
        "import", help="create a model folder from a checkpoint", usage=usage, description=IMPORT
    )
    lineages = action.add_subparsers(dest="lineage", required=True, prog=f"{prog} import")
    openflamingo = lineages.add_parser(
        "openflamingo", help="a checkpoint.pt and its frozen models, by path or name", description=OPENFLAMINGO
    )
    openflamingo.add_argument(
        "--checkpoint", required=True, help="checkpoint.pt (a state dict or from a training run), or its repository"
    )
    openflamingo.add_argument("--language-model", required=True, help="Hugging Face folder or repository")
    openflamingo.add_argument(
        "--vision-model", required=True, help="a folder or repository of an open_clip or Hugging Face CLIP"
    )
    openflamingo.add_argument("--cross-attn-every-n-layers", type=int, required=True, metavar="N")
    idefics = lineages.add_parser(
        "idefics", help="a Hugging Face folder of IDEFICS (version 1, not 2 or 3)", description=IDEFICS
    )
    idefics.add_argument("--from", dest="source", required=True, help="the Hugging Face folder or repository")
    for lineage in (openflamingo, idefics):
        lineage.add_argument("--out", type=Path, required=True, help="the new folder; it must be empty or not exist")
        lineage.add_argument(
            "--dtype", choices=DTYPES, default="keep", help="dtype of the written weights (default: keep)"
        )
    return parser


def _add_join(parser: argparse.ArgumentParser) -> None:
    sizes = BridgeSizes()
    parser.add_argument(
        "--language-model", required=True, help="a Hugging Face or model folder, a repository, a GGUF file, or default"
    )
    parser.add_argument(
        "--vision-model",
        required=True,
        help="a folder or repository of CLIP or timm, the vision folder of a contrastive run, a model folder, or default",
    )
    parser.add_argument(
        "--cross-attn-every", type=int, metavar="N", help="insert gated layers before layers 0, N, 2N, ... (default: 4)"
    )
    parser.add_argument(
        "--num-latents", type=int, default=sizes.num_latents, help="visual tokens per image (default: %(default)s)"
    )
    parser.add_argument(
        "--resampler-layers",
        type=int,
        default=sizes.resampler_layers,
        help="depth of the resampler (default: %(default)s)",
    )
    parser.add_argument("--resampler-dim", type=int, help="width of the resampler (default: that of the features)")
    parser.add_argument("--out", type=Path, required=True, help="the new folder; it must be empty or not exist")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())
