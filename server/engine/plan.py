"""A step for the runner, and what is left of its budgets while the scheduler fills it."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from server.engine.caches import Encoding
from server.engine.sequence import Sequence
from server.engine.shares import Pace


@dataclass(slots=True)
class Row:
    """One sequence's part of a step: `count` tokens from `start`. It `samples` if that reaches the sequence's end."""

    sequence: Sequence
    start: int
    count: int
    samples: bool


@dataclass(slots=True)
class Plan:
    """A step for the runner: rows, encodings and copies, and the budgets that are left."""

    tokens_left: int
    frames_left: int
    rows: list[Row] = field(default_factory=list)
    encodings: list[Encoding] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # blocks (from, to), copied before anything else
    admitted: list[Sequence] = field(default_factory=list)
    missing_media: list[bytes] = field(default_factory=list)  # sources to request
    pace: Pace = field(default_factory=Pace)
    seats_left: int = 0
    num_newcomer_seats: int = 0  # of these, those for requests of which no sequence runs
    in_progress: set[bytes] = field(default_factory=set)  # hashes of the blocks that are being computed
    work: float = 0.0
    num_frames: int = 0
    seconds: float = 0.0  # that the step is expected to take
    max_seconds: float = inf
    # the next piece may take longer, and the next media item may have more frames: otherwise a large one would never run
    may_exceed: bool = True
    is_last_resort: bool = False  # nothing else can run, so nothing is kept for others

    def has_time_for(self, seconds: float) -> bool:
        return self.seconds + seconds <= self.max_seconds

    def has_room_for(self, num_frames: int) -> bool:
        """Return whether a media item can be encoded; one with more frames than the budget is encoded alone."""
        is_within = num_frames <= self.frames_left and self.has_time_for(num_frames * self.pace.per_frame)
        return is_within or (self.may_exceed and not self.encodings)

    def add_encoding(self, encoding: Encoding, num_frames: int) -> None:
        self.encodings.append(encoding)
        self.frames_left -= num_frames
        self.num_frames += num_frames
        self.seconds += num_frames * self.pace.per_frame


@dataclass(slots=True)
class Group:
    """Sequences that want to run: those that decode, and those with a prompt to compute, running or waiting."""

    decoding: list[Sequence] = field(default_factory=list)
    prompts: list[Sequence] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decoding or self.prompts)
