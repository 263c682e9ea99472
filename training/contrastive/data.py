"""Pairs are read from shards as the encoder's pixels and the text's tokens; bad records are skipped and logged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from model.config import VisionConfig
from model.media import MediaLimits, load_image, resize
from model.prompt import Text
from model.vision import normalise
from training.config import SetConfig
from training.contrastive.config import PairsConfig
from training.data.bad_record_log import BadRecord, BadRecordLog
from training.data.records import parse
from training.data.shards import RawRecord, read_shard, seeded
from training.data.stream import RecordStream
from training.data.undecodable import Undecodable

MAX_SHADE = 0.25  # the maximum relative change of brightness and of contrast


@dataclass(frozen=True, slots=True)
class Pair:
    pixels: Tensor  # [3, h, w]
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Pairs:
    """A batch of pairs; texts are padded with zeros after their lengths."""

    pixels: Tensor  # [B, 3, h, w]
    token_ids: Tensor  # [B, T] int64
    lengths: Tensor  # [B] int64

    def to(self, device: torch.device) -> Pairs:
        return Pairs(self.pixels.to(device), self.token_ids.to(device), self.lengths.to(device))


@dataclass(frozen=True, slots=True)
class PairReader:
    """A reader that turns records into pairs."""

    tokenizer: Tokenizer
    vision: VisionConfig
    max_tokens: int
    augment: bool
    undecodable: Undecodable = field(default_factory=Undecodable)

    def pair(self, record: RawRecord, set_config: SetConfig, rng: Random) -> Pair:
        parsed = parse(record, set_config, rng)
        (text,) = [segment.text for segment in parsed.example.segments if isinstance(segment, Text)]
        ids = self.tokenizer.encode(text.strip(), add_special_tokens=False).ids[: self.max_tokens]
        if not ids:
            raise BadRecord("no text")
        ((digest, file),) = parsed.files.items()
        with self.undecodable.tried_once(digest):
            square = resize(load_image(file, MediaLimits()), self.vision)
        if self.augment:
            square = augment(square, rng)
        return Pair(normalise(torch.from_numpy(square.copy())[None], self.vision)[0], ids)


def augment(square: NDArray[np.uint8], rng: Random) -> NDArray[np.uint8]:  # [h, w, 3]
    if rng.random() < 0.5:
        square = square[:, ::-1]
    brightness, contrast = (rng.uniform(1 - MAX_SHADE, 1 + MAX_SHADE) for _ in range(2))
    mean = square.mean()
    shaded = (square.astype(np.float32) - mean) * contrast + mean * brightness
    return shaded.clip(0, 255).astype(np.uint8)


class PairStream(RecordStream[Pair]):
    """An endless stream of a set's pairs."""

    def __init__(self, shards: Sequence[Path], config: PairsConfig, reader: PairReader, seed: int) -> None:
        super().__init__(config.name, shards, seed=seed, window=config.window)
        self.config = config
        self._reader = reader
        self._set = SetConfig(name=config.name, kind="pairs", shards=config.shards)

    def batch(self) -> Pairs:
        return collate_pairs([self.take() for _ in range(self.config.batch_size)])

    def _prepare(self, record: RawRecord, rng: Random) -> Pair:
        return self._reader.pair(record, self._set, rng)


def collate_pairs(pairs: Sequence[Pair]) -> Pairs:
    lengths = torch.tensor([len(pair.token_ids) for pair in pairs])
    token_ids = torch.zeros(len(pairs), int(lengths.max()), dtype=torch.int64)
    for row, pair in zip(token_ids, pairs, strict=True):
        row[: len(pair.token_ids)] = torch.tensor(pair.token_ids)
    return Pairs(torch.stack([pair.pixels for pair in pairs]), token_ids, lengths)


def read_all_pairs(shards: Sequence[Path], reader: PairReader) -> Iterator[Pair]:
    """Yield all good pairs of held-out shards once."""
    held_out = SetConfig(name="held_out", kind="pairs", shards="")
    bad_records = BadRecordLog(held_out.name)
    for shard in shards:
        for record in read_shard(shard):
            try:
                yield reader.pair(record, held_out, seeded(record.name))
            except BadRecord as error:
                bad_records.add(record.name, error)
