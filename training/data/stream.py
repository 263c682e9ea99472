"""Reads shards as an endless stream of parsed, tokenized and decoded examples; bad records are skipped and logged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from glob import glob
from pathlib import Path
from random import Random
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from model.config import VisionConfig
from model.media import MediaLimits, load_image, load_video, resize
from model.prompt import PromptError, PromptTokenizer
from model.vision import normalise
from training.config import SetConfig
from training.data.bad_record_log import BadRecord, BadRecordLog
from training.data.records import parse
from training.data.shards import Position, RawRecord, ShardError, seeded, stream_records
from training.data.undecodable import Undecodable
from training.examples import Limits, tokenize
from training.mixture import PreparedExample

ExampleT = TypeVar("ExampleT")

# a shard may hold some bad records; a longer run of them indicates an error in the set
MAX_BAD_IN_A_ROW = 10_000
# a clip is read whole, at one frame per second
MAX_CLIP_SECONDS = 120
CLIP_LIMITS = MediaLimits(max_seconds=MAX_CLIP_SECONDS, max_frames=MAX_CLIP_SECONDS + 1)


class RecordStream(ABC, Generic[ExampleT]):
    """An endless stream of a set's examples that can be resumed from a position; bad records are skipped."""

    def __init__(
        self, set_name: str, shards: Sequence[Path], *, seed: int, window: int, index: int = 0, num_streams: int = 1
    ) -> None:
        self.bad_records = BadRecordLog(set_name)
        self._shards, self._seed, self._window = shards, seed, window
        self._index, self._num_streams = index, num_streams
        self._position = Position()
        self._records = self._records_from(self._position)

    @abstractmethod
    def _prepare(self, record: RawRecord, rng: Random) -> ExampleT:
        """Turn a record into an example; raises BadRecord."""

    def take(self) -> ExampleT:
        """Return the next good example.

        Raises ShardError after `MAX_BAD_IN_A_ROW` consecutive bad records.
        """
        for _ in range(MAX_BAD_IN_A_ROW):
            self._position, record = next(self._records)
            # seeded by the position rather than drawn from a running generator, so a resumed run draws the same
            rng = seeded(f"{self._seed}/{self._position}/{record.name}")
            try:
                return self._prepare(record, rng)
            except BadRecord as error:
                self.bad_records.add(record.name, error)
        log = self.bad_records
        reasons = ", ".join(f"{reason} ({count})" for reason, count in log.counts.most_common())
        message = f"set {log.set_name}: {MAX_BAD_IN_A_ROW} bad records in a row; of all so far: {reasons}"
        raise ShardError(f"{message}; check the kind of the set, and its files")

    def state(self) -> Any:
        return asdict(self._position)

    def load_state(self, state: Any) -> None:
        self._position = Position(**state)
        self._records = self._records_from(self._position)

    def _records_from(self, start: Position) -> Iterator[tuple[Position, RawRecord]]:
        return stream_records(
            self._shards,
            seed=self._seed,
            window=self._window,
            index=self._index,
            num_streams=self._num_streams,
            start=start,
        )


class ShardStream(RecordStream[PreparedExample]):
    """One of a set's streams of examples for the bridge."""

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
        super().__init__(config.name, shards, seed=seed, window=config.window, index=index, num_streams=config.streams)
        self.config = config
        self._tokenizer, self._vision = tokenizer, vision
        self._limits = Limits(max_tokens=config.max_tokens, max_media=config.max_media, p_next=config.p_next)
        self._undecodable = Undecodable()

    def _prepare(self, record: RawRecord, rng: Random) -> PreparedExample:
        parsed = parse(record, self.config, rng)
        try:
            tokens = tokenize(parsed.example, self._tokenizer, self._limits, rng)
        except PromptError as error:
            raise BadRecord("cannot be a prompt", str(error)) from None
        if not tokens.num_targets:
            raise BadRecord("no target token")
        return PreparedExample(
            tokens, {digest: self._pixels(digest, parsed.files[digest], rng) for digest in tokens.media}
        )

    def _pixels(self, digest: bytes, file: bytes, rng: Random) -> Tensor:  # -> [F, 3, h, w]
        """Return an image, or at most `max_frames` consecutive frames of a clip, from a random one."""
        with self._undecodable.tried_once(digest):
            frames = (
                load_video(file, CLIP_LIMITS) if self.config.kind == "videos" else [load_image(file, MediaLimits())]
            )
            # scaled as they are decoded: all large frames of a clip would need much memory
            squares = [resize(frame, self._vision) for frame in frames]
        first = rng.randrange(max(1, len(squares) - self.config.max_frames + 1))
        used = np.stack(squares[first : first + self.config.max_frames])
        return normalise(torch.from_numpy(used), self._vision)


def find_shards(pattern: str) -> list[Path]:
    """Return the files that match a glob pattern, which may begin with `~`, sorted.

    Raises ShardError if no file matches.
    """
    matches = map(Path, glob(str(Path(pattern).expanduser()), recursive=True))
    shards = sorted(path for path in matches if path.is_file())
    if not shards:
        is_folder = Path(pattern).expanduser().is_dir()
        hint = f": it is a folder, whose shards are {pattern.rstrip('/')}/*.tar" if is_folder else ""
        raise ShardError(f"no shard matches {pattern}{hint}")
    return shards
