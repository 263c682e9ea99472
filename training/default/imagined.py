"""Features of photographs that no one took: drawn from what the frozen encoder itself says that photographs look like.

The registries carry almost no photograph that may be trained on. But the encoder was trained on a million, and has kept
two things of them: its last batch norm, that is the mean and the deviation of every channel before the ReLU, and its
classifier, a direction for each of ImageNet's thousand classes. An image of a class is noise of that mean and deviation,
even over neighbouring places, with the class's direction added where the object is. What is drawn so has the sparsity,
the norm and the classifier's confidence of real features; the bridge learns to read directions that drawings never take.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor

from model.zoo.config import VISION_FILE
from model.zoo.default import find
from training.default.catalogue import Rows
from training.default_data.records import Record
from training.default_data.split import held_out

SIDE = 7
# images of a class that are told apart by their number
NUM_IMAGES = 1000
# ImageNet's classes follow WordNet: first and last class of a kind; what is between them is left out
KINDS = (
    (0, 6, "fish"),
    (7, 24, "bird"),
    (25, 32, "amphibian"),
    (33, 37, "turtle"),
    (38, 48, "lizard"),
    (52, 68, "snake"),
    (72, 77, "spider"),
    (80, 100, "bird"),
    (118, 126, "crustacean"),
    (127, 146, "bird"),
    (147, 150, "sea mammal"),
    (151, 268, "dog"),
    (269, 275, "wild dog"),
    (277, 280, "fox"),
    (281, 285, "cat"),
    (286, 293, "big cat"),
    (294, 297, "bear"),
    (300, 326, "insect"),
    (330, 332, "rabbit"),
    (333, 338, "rodent"),
    (339, 355, "hoofed animal"),
    (365, 384, "monkey"),
    (389, 397, "fish"),
    (398, 923, "object"),
    (924, 935, "dish"),
    (936, 947, "vegetable"),
    (948, 957, "fruit"),
    (970, 980, "landscape"),
    (991, 997, "mushroom"),
)


@dataclass(frozen=True, slots=True)
class Encoder:
    """Of the last batch norm, by channel [Dv], and of the classifier, [classes, Dv], rows of deviation 1."""

    mean: Tensor
    deviation: Tensor
    directions: Tensor

    @classmethod
    def load(cls, file: Path) -> Encoder:
        tensors = torch.load(file, weights_only=True)
        classifier = tensors["_fc.weight"]
        centred = classifier - classifier.mean(0)
        return cls(tensors["_bn1.bias"], tensors["_bn1.weight"], centred / centred.std(1, keepdim=True))


class Imagined:
    """What `Episodes` asks of a catalogue; row n is image n % NUM_IMAGES of class n // NUM_IMAGES."""

    def __init__(self, encoder: Encoder, names: list[str]) -> None:
        self._encoder = encoder
        self.records = Records(names)

    @classmethod
    def load(cls) -> Imagined:
        info: Any = ImageNetInfo()
        names = [info.index_to_description(index).split(",")[0] for index in range(info.num_classes())]
        return cls(Encoder.load(find(VISION_FILE)), names)

    @cached_property
    def labels(self) -> Rows:
        return {record.label: self._rows(number) for number, record in self.records.trained()}

    @cached_property
    def categories(self) -> Rows:
        found: Rows = {}
        for number, record in self.records.trained():
            found.setdefault(record.category, []).extend(self._rows(number))
        return found

    def features(self, row: int) -> Tensor:  # -> [F, P, Dv], one frame
        encoder, rng = self._encoder, torch.Generator().manual_seed(row)
        number, width = row // NUM_IMAGES, encoder.mean.shape[0]
        others = encoder.directions[torch.randint(len(encoder.directions), (3,), generator=rng)].mean(0)
        own = 0.54 * others + 0.51 * torch.randn(width, generator=rng)
        strength = 0.25 + 0.25 * torch.rand((), generator=rng)
        signal = strength * encoder.directions[number] + own  # [Dv], the image's
        gain = 1.6 * (0.15 * torch.randn((), generator=rng)).exp()
        noise = _even(torch.randn(width, SIDE, SIDE, generator=rng))
        drawn = encoder.mean + encoder.deviation * (gain * _object(rng) * signal + 0.85 * noise)
        return drawn.relu().clamp(max=6.0).half()[None]

    @staticmethod
    def _rows(number: int) -> list[int]:
        return list(range(number * NUM_IMAGES, (number + 1) * NUM_IMAGES))


class Records:
    """`records[row]`, made when it is asked for."""

    def __init__(self, names: list[str]) -> None:
        kinds = {number: kind for first, last, kind in KINDS for number in range(first, last + 1)}
        self._records = [_record(number, name, kinds.get(number, "")) for number, name in enumerate(names)]

    def __getitem__(self, row: int) -> Record:
        return self._records[row // NUM_IMAGES]

    def trained(self) -> list[tuple[int, Record]]:
        """Numbers and records of classes with a kind, without those held out by their name or their kind's; of two
        classes of one name, the first."""
        kept: dict[str, tuple[int, Record]] = {}
        for number, record in enumerate(self._records):
            if record.category and not held_out(record.label) and not held_out(record.category):
                kept.setdefault(record.label, (number, record))
        return list(kept.values())


def _record(number: int, name: str, kind: str) -> Record:
    return Record(
        image=f"imagined/{number}",
        label=name,
        category=kind,
        tags=(kind,),
        source="imagined",
        licence="none: no image",
        style="a photograph",
        domain="photograph",
        trains=True,
    )


def _even(noise: Tensor) -> Tensor:  # [Dv, y, x] -> [P, Dv], of deviation 1
    smooth = F.avg_pool2d(noise[None], 3, 1, 1, count_include_pad=False)[0]
    return (smooth / smooth.std()).flatten(1).T


def _object(rng: torch.Generator) -> Tensor:  # -> [P, 1], near 1 where the object is
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    centre = (SIDE - 1) / 2 + torch.randn(2, generator=rng)
    radius = 1.5 + 1.5 * torch.rand((), generator=rng)
    distance = (y - centre[0]).square() + (x - centre[1]).square()
    return (-distance / (2 * radius.square())).exp().flatten()[:, None]
