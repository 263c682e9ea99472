"""Pairs from shards: pixels as the encoder reads them, and a text's tokens; bad records are passed over by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from model.config import VisionConfig
from model.media import MediaError, MediaLimits, load_image, resize
from model.prompt import Text
from model.vision import normalise
from training.config import SetConfig
from training.contrastive.config import PairsConfig
from training.data.complaints import BadRecord, Complaints
from training.data.records import parse
from training.data.shards import Position, RawRecord, ShardError, read_shard, stream_records
from training.data.stream import MOST_BAD_IN_A_ROW

SHADE = 0.25  # brightness and contrast change by up to so much


@dataclass(frozen=True, slots=True)
class Pair:
    pixels: Tensor  # [3, h, w]
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Pairs:
    """A batch; texts are padded with zeros behind their lengths."""

    pixels: Tensor  # [B, 3, h, w]
    token_ids: Tensor  # [B, T] int64
    lengths: Tensor  # [B] int64

    def to(self, device: torch.device) -> Pairs:
        return Pairs(self.pixels.to(device), self.token_ids.to(device), self.lengths.to(device))


@dataclass(frozen=True, slots=True)
class Reader:
    """How a record becomes a pair."""

    tokenizer: Tokenizer
    vision: VisionConfig
    max_tokens: int
    augment: bool

    def pair(self, record: RawRecord, set_config: SetConfig, rng: Random) -> Pair:
        parsed = parse(record, set_config, rng)
        (text,) = [segment.text for segment in parsed.example.segments if isinstance(segment, Text)]
        ids = self.tokenizer.encode(text.strip(), add_special_tokens=False).ids[: self.max_tokens]
        if not ids:
            raise BadRecord("no text")
        (file,) = parsed.files.values()
        try:
            square = resize(load_image(file, MediaLimits()), self.vision)
        except MediaError as error:
            raise BadRecord("media cannot be decoded", str(error)) from None
        if self.augment:
            square = augmented(square, rng)
        return Pair(normalise(torch.from_numpy(square.copy())[None], self.vision)[0], ids)


def augmented(square: NDArray[np.uint8], rng: Random) -> NDArray[np.uint8]:  # [h, w, 3]
    if rng.random() < 0.5:
        square = square[:, ::-1]
    brightness, contrast = (rng.uniform(1 - SHADE, 1 + SHADE) for _ in range(2))
    mean = square.mean()
    shaded = (square.astype(np.float32) - mean) * contrast + mean * brightness
    return shaded.clip(0, 255).astype(np.uint8)


class PairStream:
    """A set's pairs without end, from a position that can be taken up again."""

    def __init__(self, shards: Sequence[Path], config: PairsConfig, reader: Reader, seed: int) -> None:
        self.config = config
        self.complaints = Complaints(config.name)
        self._shards, self._reader, self._seed = shards, reader, seed
        self._set = SetConfig(name=config.name, kind="pairs", shards=config.shards)
        self._position = Position()
        self._records = self._from(self._position)

    def batch(self) -> Pairs:
        return together([self.take() for _ in range(self.config.batch_size)])

    def take(self) -> Pair:
        for _ in range(MOST_BAD_IN_A_ROW):
            self._position, record = next(self._records)
            try:
                # drawn from the place, not from a running generator: a resumed run draws the same
                return self._reader.pair(record, self._set, Random(f"{self._seed}/{self._position}/{record.name}"))
            except BadRecord as error:
                self.complaints.add(record.name, error)
        raise ShardError(f"set {self.config.name}: {MOST_BAD_IN_A_ROW} bad records in a row: {self.complaints.counts}")

    def state(self) -> Any:
        return asdict(self._position)

    def load_state(self, state: Any) -> None:
        self._position = Position(**state)
        self._records = self._from(self._position)

    def _from(self, start: Position) -> Iterator[tuple[Position, RawRecord]]:
        return stream_records(
            self._shards, seed=self._seed, window=self.config.window, index=0, num_streams=1, start=start
        )


def together(pairs: Sequence[Pair]) -> Pairs:
    lengths = torch.tensor([len(pair.token_ids) for pair in pairs])
    token_ids = torch.zeros(len(pairs), int(lengths.max()), dtype=torch.int64)
    for row, pair in zip(token_ids, pairs, strict=True):
        row[: len(pair.token_ids)] = torch.tensor(pair.token_ids)
    return Pairs(torch.stack([pair.pixels for pair in pairs]), token_ids, lengths)


def every_pair(shards: Sequence[Path], reader: Reader) -> Iterator[Pair]:
    """All good pairs of held-out shards, once."""
    held_out = SetConfig(name="held_out", kind="pairs", shards="")
    complaints = Complaints(held_out.name)
    for shard in shards:
        for record in read_shard(shard):
            try:
                yield reader.pair(record, held_out, Random(record.name))
            except BadRecord as error:
                complaints.add(record.name, error)
