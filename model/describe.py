"""The paper's three models as data, and their parameters next to its figures: `python -m model.describe NAME|FOLDER ...`.

Sizes are those of appendix A.1 and table 1. The language model is Chinchilla-like: RMSNorm, GELU, 32,000 tokens, no biases.
Chinchilla's relative positions are rotary here. Weights were never published; the presets are for training, and are counted
on the meta device. A mark notes figures that do not follow from the paper's own table of layers and widths.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from model.config import (
    ConfigError,
    FlamingoConfig,
    GatedConfig,
    LanguageModelConfig,
    PromptConfig,
    ResamplerConfig,
    VisionConfig,
    load_config,
)
from model.flamingo import Flamingo

HEAD_DIM = 128
VOCABULARY = 32_000

NFNET_F6 = VisionConfig(
    architecture="dm_nfnet_f6",
    image_size=320,
    feature_dim=3072,
    num_patches=100,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    resize="pad",
)

RESAMPLER = ResamplerConfig(
    dim=1536,
    num_layers=6,
    num_heads=16,
    head_dim=HEAD_DIM,
    ffn_dim=4 * 1536,
    activation="squared_relu",
    num_frames=8,
    input_projection=True,
)

PROMPT = PromptConfig(media_token="<image>", end_of_chunk="<EOC>", eos=("<EOC>", "<EOS>"), suppressed=("<image>",))


def chinchilla(*, dim: int, num_layers: int, num_heads: int) -> LanguageModelConfig:
    return LanguageModelConfig(
        family="chinchilla",
        vocab_size=VOCABULARY,
        num_new_tokens=2,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=HEAD_DIM,
        ffn_dim=4 * dim,
        activation="gelu",
        max_positions=2048,
        norm="rms_norm",
        norm_eps=1e-6,
        position="rotary",
        rotary_dim=HEAD_DIM,
        tied_head=True,
    )


def flamingo(name: str, *, dim: int, num_layers: int, num_heads: int, interval: int) -> FlamingoConfig:
    return FlamingoConfig(
        name=name,
        family="flamingo",
        vision=NFNET_F6,
        resampler=RESAMPLER,
        gated=GatedConfig(
            first_layer=0,
            interval=interval,
            num_heads=num_heads,
            head_dim=HEAD_DIM,
            ffn_dim=4 * dim,
            activation="squared_relu",
            media_norm=True,
        ),
        language_model=chinchilla(dim=dim, num_layers=num_layers, num_heads=num_heads),
        prompt=PROMPT,
    )


PRESETS = {
    config.name: config
    for config in (
        flamingo("flamingo-3b", dim=2048, num_layers=24, num_heads=16, interval=1),
        flamingo("flamingo-9b", dim=4096, num_layers=40, num_heads=32, interval=4),
        flamingo("flamingo-80b", dim=8192, num_layers=80, num_heads=64, interval=7),
    )
}

# numbers of parameters by part, as stated in the paper (table 1)
PUBLISHED = {
    "flamingo-3b": {"language_model": 1.4e9, "vision": 435e6, "gated": 1.2e9, "resampler": 194e6},
    "flamingo-9b": {"language_model": 7.1e9, "vision": 435e6, "gated": 1.6e9, "resampler": 194e6},
    "flamingo-80b": {"language_model": 70e9, "vision": 435e6, "gated": 10e9, "resampler": 194e6},
}
# Published figures that do not follow from the paper's own table of layers and widths (appendix C.1).
DOES_NOT_FOLLOW = {
    ("flamingo-9b", "gated"): " *",
    ("flamingo-9b", "language_model"): " +",
    ("flamingo-80b", "gated"): " *",
}
NOTES = {
    " *": "does not follow from the paper's own layers and widths",
    " +": "40 layers of width 4096 have more than 7.1 B parameters in any variant",
}
PARTS = {"language_model": "frozen", "vision": "frozen", "gated": "trainable", "resampler": "trainable"}


def parameters(config: FlamingoConfig) -> dict[str, int]:
    """Return the number of parameters by part; rows of new tokens count as the language model's."""
    with torch.device("meta"):
        model = Flamingo(config)
    return {part: sum(weights.numel() for weights in getattr(model, part).parameters()) for part in PARTS}


def rows(config: FlamingoConfig) -> Iterator[tuple[str, str, str, str, str]]:
    published = PUBLISHED.get(config.name, {})
    for part, number in parameters(config).items():
        stated = published.get(part)
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


def main(arguments: Sequence[str] | None = None, prog: str = "python -m model.describe") -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("names", nargs="*", default=list(PRESETS), metavar="NAME|FOLDER")
    names = parser.parse_args(arguments).names
    try:
        print("\n\n".join(table(find(name)) for name in names))
    except ConfigError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
