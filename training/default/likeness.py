"""Write the default model's likeness to `model/zoo/`: `python -m training.default.likeness [--data FOLDER]`.

The classifier comes from the encoder's file; its classes are synsets of WordNet. The discriminants are fitted to the
training drawings in the same way as those that initialise the resampler, but there are more of them. The familiar
directions are the principal components of the same drawings.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import timm.data
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from model.likeness import to_tensors
from model.zoo.default import LIKENESS_FILE
from training.default.catalogue import Catalogue
from training.default.discriminants import NUM_FAMILIAR, WIDTH_RATIO, familiar_directions, fit_discriminants
from training.default_data.packages import fetch, unpack_debian
from training.default_data.records import DEFAULT_FOLDER
from training.default_data.sources import WORDNET

NUM_DISCRIMINANTS = 384
# the result of `python -m evaluation.shares`
SHARES = (1.0, 0.0875, 0.0875, 1.4)
# the synsets of the classes, in the order of the classifier
SYNSETS = Path(timm.data.__file__).parent / "_info" / "imagenet_synsets.txt"
NOUNS = "usr/share/wordnet/data.noun"
HYPERNYMS = ("@", "@i")


def read_hypernyms(lines: Iterable[str]) -> dict[str, list[str]]:
    """Return the hypernyms of each noun synset by offset, from the lines of WordNet's `data.noun` (wndb(5WN))."""
    hypernyms: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("  "):  # the licence
            continue
        fields = line.partition(" | ")[0].split()
        start = 4 + 2 * int(fields[3], 16)  # the words of the synset
        pointers = fields[start + 1 : start + 1 + 4 * int(fields[start])]
        symbols, offsets = pointers[0::4], pointers[1::4]
        hypernyms[fields[0]] = [o for symbol, o in zip(symbols, offsets, strict=True) if symbol in HYPERNYMS]
    return hypernyms


def find_ancestors(classes: list[str], hypernyms: Mapping[str, list[str]]) -> NDArray[np.bool_]:
    """Return the classes below each node, [A, C]: not the root, and only one of several nodes with the same classes."""
    below: dict[str, set[int]] = {}
    for index, offset in enumerate(classes):
        for node in _closure(offset, hypernyms):
            below.setdefault(node, set()).add(index)
    distinct = sorted({tuple(sorted(members)) for members in below.values() if len(members) < len(classes)})
    ancestors = np.zeros((len(distinct), len(classes)), bool)
    for row, members in enumerate(distinct):
        ancestors[row, list(members)] = True
    return ancestors


def _closure(offset: str, hypernyms: Mapping[str, list[str]]) -> set[str]:
    nodes, new = set[str](), [offset]
    while new:
        node = new.pop()
        if node not in nodes:
            nodes.add(node)
            new += hypernyms[node]
    return nodes


def build(data: Path) -> dict[str, NDArray[np.generic]]:
    """Return all tensors except the classifier's, from the data folder of `training.default_data`."""
    package = fetch(WORDNET, data / "packages")
    nouns = unpack_debian(package, data / "unpacked" / WORDNET.name) / NOUNS
    with nouns.open(encoding="utf-8") as lines:
        hypernyms = read_hypernyms(lines)
    classes = [synset.removeprefix("n") for synset in SYNSETS.read_text(encoding="utf-8").split()]
    discriminants = fit_discriminants(data, NUM_DISCRIMINANTS * WIDTH_RATIO)
    catalogue = Catalogue(data)
    images = torch.stack([catalogue.pooled(row) for rows in catalogue.labels.values() for row in rows])
    return to_tensors(
        find_ancestors(classes, hypernyms),
        SHARES,
        mean=discriminants.mean.numpy(),
        directions=discriminants.directions.numpy(),
        familiar=familiar_directions(images, discriminants.mean, NUM_FAMILIAR).numpy(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.default.likeness", description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=DEFAULT_FOLDER, help=f"the data folder (default: {DEFAULT_FOLDER})"
    )
    save_file(build(parser.parse_args().data), LIKENESS_FILE)
    print(f"{LIKENESS_FILE}: {LIKENESS_FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
