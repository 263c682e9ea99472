"""A step for the runner, and what is left of its budgets while the scheduler fills it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import inf

from server.engine.caches import Piece
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
    """A step for the runner: rows, pieces of media and copies, and the budgets that are left.

    `max_frames` bounds the frames of a step with rows, `max_frames_idle` those of one without.
    """

    step: int  # its number
    tokens_left: int
    max_frames: int
    max_frames_idle: int
    rows: list[Row] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # blocks (from, to), copied before anything else
    admitted: list[Sequence] = field(default_factory=list)
    missing_media: list[bytes] = field(default_factory=list)  # sources to request
    pace: Pace = field(default_factory=Pace)
    seats_left: int = 0
    num_newcomer_seats: int = 0  # of these, those for requests of which no sequence runs
    in_progress: set[bytes] = field(default_factory=set)  # hashes of the blocks that are being computed
    work: float = 0.0
    num_frames: int = 0
    frames_by_request: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0  # that the step is expected to take
    max_seconds: float = inf
    # the next piece of a prompt or a media item may take longer: otherwise the smallest one might never run
    may_exceed: bool = True
    is_last_resort: bool = False  # nothing else can run, so nothing is kept for others

    @property
    def frames_left(self) -> int:
        """Return how many more frames can be encoded in this step."""
        left = (self.max_frames if self.rows else self.max_frames_idle) - self.num_frames
        if self.pace.per_frame and self.max_seconds < inf:
            left = min(left, int((self.max_seconds - self.seconds) / self.pace.per_frame))
        return max(left, int(self.may_exceed and not self.pieces))

    def add_piece(self, piece: Piece, request_id: str) -> None:
        """Encode a piece of a media item for a request; others may wait for it too."""
        self.pieces.append(piece)
        if piece.count:
            self.frames_by_request[request_id] += piece.count
        self.num_frames += piece.count
        self.seconds += piece.count * self.pace.per_frame


@dataclass(slots=True)
class Group:
    """Sequences that want to run: those that decode, and those with a prompt to compute, running or waiting."""

    decoding: list[Sequence] = field(default_factory=list)
    prompts: list[Sequence] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decoding or self.prompts)
