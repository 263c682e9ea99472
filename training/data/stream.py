"""Shards to examples that a step can use: parsed, tokenized, their media decoded, and bad ones passed over by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.config import VisionConfig
from model.media import MediaError, MediaLimits, load_image, load_video, resize
from model.prompt import PromptError
from model.tokenizer import PromptTokenizer
from model.vision import normalise
from training.config import SetConfig
from training.data.complaints import BadRecord, Complaints
from training.data.records import parse
from training.data.shards import Position, RawRecord, ShardError, stream_records
from training.examples import Limits, tokenize
from training.mixture import Prepared

# a shard may hold some bad records; this many without a good one between is a mistake in the set
MOST_BAD_IN_A_ROW = 10_000


class ShardStream:
    def __init__(
        self,
        shards: Sequence[Path],
        config: SetConfig,
        tokenizer: PromptTokenizer,
        vision: VisionConfig,
        *,
        seed: int,
        index: int = 0,
    ) -> None:
        self.config = config
        self.complaints = Complaints(config.name)
        self._shards, self._tokenizer, self._vision = shards, tokenizer, vision
        self._seed, self._index = seed, index
        self._limits = Limits(max_tokens=config.max_tokens, max_media=config.max_media, p_next=config.p_next)
        self._position = Position()
        self._records = self._from(self._position)

    def take(self) -> Prepared:
        for _ in range(MOST_BAD_IN_A_ROW):
            self._position, record = next(self._records)
            try:
                return self._prepare(record)
            except BadRecord as error:
                self.complaints.add(record.name, error)
        raise ShardError(f"set {self.config.name}: {MOST_BAD_IN_A_ROW} bad records in a row: {self.complaints.counts}")

    def state(self) -> Any:
        return asdict(self._position)

    def load_state(self, state: Any) -> None:
        self._position = Position(**state)
        self._records = self._from(self._position)

    def _from(self, position: Position) -> Iterator[tuple[Position, RawRecord]]:
        return stream_records(
            self._shards,
            seed=self._seed,
            window=self.config.window,
            index=self._index,
            num_streams=self.config.streams,
            start=position,
        )

    def _prepare(self, record: RawRecord) -> Prepared:
        # drawn from the place, not from a running generator: a resumed run draws the same
        rng = Random(f"{self._seed}/{self._position}/{record.name}")
        parsed = parse(record, self.config, rng)
        try:
            tokens = tokenize(parsed.example, self._tokenizer, self._limits, rng)
        except PromptError as error:
            raise BadRecord("cannot be a prompt", str(error)) from None
        if not tokens.num_targets:
            raise BadRecord("nothing to learn")
        return Prepared(tokens, {digest: self._shown(parsed.files[digest]) for digest in tokens.media})

    def _shown(self, file: bytes) -> Tensor:  # -> [F, 3, h, w]
        limits = MediaLimits(max_frames=self.config.max_frames)
        try:
            frames = [load_image(file, limits)] if self.config.kind != "videos" else load_video(file, limits)
        except MediaError as error:
            raise BadRecord("media cannot be decoded", str(error)) from None
        squares = np.stack([resize(frame, self._vision) for frame in frames])
        return normalise(torch.from_numpy(squares), self._vision)


def find_shards(pattern: str) -> list[Path]:
    path = Path(pattern)
    base = Path(path.anchor) if path.is_absolute() else Path()
    found = sorted(base.glob(str(path.relative_to(path.anchor) if path.is_absolute() else path)))
    if not found:
        raise ShardError(f"no shard matches {pattern}")
    return found
