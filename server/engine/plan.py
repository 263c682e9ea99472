"""A step for the runner, and what is left of its budgets while the scheduler fills it."""

from __future__ import annotations

from collections import Counter, abc
from dataclasses import dataclass, field
from math import inf

from server.engine.caches.media import Piece
from server.engine.pace import Pace
from server.engine.sequence import Sequence

# stands for a token that only the device knows
UNKNOWN = 0


@dataclass(slots=True)
class Row:
    """One sequence's part of a step: `count` tokens from `start`. It `samples` if that reaches the sequence's end.

    `proposed` tokens, which the sequence does not have yet, follow its own. The row samples after each of them as well.
    A row whose one token only the device knows `follows` the row with this number of the step before, which samples it.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    proposed: abc.Sequence[int] = ()
    follows: int | None = None

    @classmethod
    def of(cls, sequence: Sequence, count: int, proposed: abc.Sequence[int] = ()) -> Row:
        """Return the row of a sequence's next `count` tokens, which it has."""
        end = sequence.num_computed + count
        return cls(sequence, sequence.num_computed, count, end == len(sequence.token_ids), proposed)

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + self.count + len(self.proposed)

    @property
    def token_ids(self) -> list[int]:
        if self.follows is not None:
            return [UNKNOWN]
        return [*self.sequence.token_ids[self.start : self.start + self.count], *self.proposed]

    @property
    def media_index(self) -> list[int]:
        if self.follows is not None:
            return self.sequence.media_index[-1:]
        index = self.sequence.media_index[self.start : self.start + self.count]
        return index + index[-1:] * len(self.proposed)


@dataclass(slots=True)
class Plan:
    """A step for the runner: rows, pieces of media and copies, and the budgets that are left.

    `max_frames` bounds the frames of a step with rows, `max_frames_idle` those of one without; `num_kept_frames` of them
    are kept for what is added later. If it `overlaps`, rows do not wait for media that are encoded next to them.
    """

    step: int  # the number of the step
    tokens_left: int
    max_frames: int
    max_frames_idle: int
    overlaps: bool = False
    num_kept_frames: int = 0
    rows: list[Row] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # blocks (from, to), copied before anything else
    admitted: list[Sequence] = field(default_factory=list)
    missing_media: list[bytes] = field(default_factory=list)  # sources to request
    pace: Pace = field(default_factory=Pace)
    seats_left: int = 0
    num_newcomer_seats: int = 0  # seats of these that are kept for requests without a running sequence
    # hashes of the blocks that are being computed, with the priority of who computes them
    in_progress: dict[bytes, int] = field(default_factory=dict)
    # shots that attend alone and are computed in this step, or are computed in part: by the hashes of their last blocks
    shots: dict[bytes, Sequence] = field(default_factory=dict)
    work: float = 0.0
    num_frames: int = 0
    num_side_frames: int = 0  # of these, the frames of side work
    frames_by_request: Counter[str] = field(default_factory=Counter)
    unread_pages: set[bytes] = field(default_factory=set)  # keys of media that no row of this step reads
    seconds: float = 0.0  # the expected duration of the step
    max_seconds: float = inf
    # the next piece of a prompt may take longer, and the next frame: otherwise the smallest piece might never run
    may_exceed: bool = True
    num_frames_before: int = 0  # when `max_seconds` was set
    is_last_resort: bool = False  # nothing else can run, so nothing is kept for others

    @property
    def is_empty(self) -> bool:
        return not (self.rows or self.pieces)

    @property
    def is_of_side_work(self) -> bool:
        """True if sequences have neither rows nor frames in this step."""
        return not self.rows and self.num_frames == self.num_side_frames

    @property
    def side_share(self) -> float:
        """The share of the step's expected duration that frames of side work take."""
        return self.num_side_frames * self.pace.per_frame / self.seconds if self.seconds else 0.0

    def limit(self, seconds: float, *, may_exceed: bool) -> None:
        """Limit the step's duration while more is added; one piece `may_exceed` it."""
        self.max_seconds, self.may_exceed, self.num_frames_before = seconds, may_exceed, self.num_frames

    @property
    def frames_left(self) -> int:
        """The number of frames that can still be added to this step."""
        left = (self.max_frames if self.rows else self.max_frames_idle) - self.num_kept_frames - self.num_frames
        if self.pace.per_frame and self.max_seconds < inf:
            num_in_time = int((self.max_seconds - self.seconds) / self.pace.per_frame)
            left = min(left, max(num_in_time, int(self.may_exceed and self.num_frames == self.num_frames_before)))
        return max(left, 0)

    @property
    def reads_its_pages(self) -> bool:
        """True if rows may read media that are encoded in this step."""
        return not self.overlaps or any(p.is_last and p.encoding.key not in self.unread_pages for p in self.pieces)

    def note_progress(self, sequence: Sequence, blocks: abc.Iterable[bytes]) -> None:
        """Note blocks that a sequence computes; if several compute a block, the most urgent one counts."""
        priority = sequence.account.priority
        for block in blocks:
            self.in_progress[block] = min(priority, self.in_progress.get(block, priority))

    def add_piece(self, piece: Piece, request_id: str) -> None:
        """Encode a piece of a media item for a request; others may wait for it too."""
        self.pieces.append(piece)
        if self.overlaps and self.rows and piece.is_last:
            self.unread_pages.add(piece.encoding.key)
        if piece.count:
            self.frames_by_request[request_id] += piece.count
        self.num_frames += piece.count
        self.seconds += piece.count * self.pace.per_frame

    def add_unread(self, pieces: abc.Collection[Piece]) -> None:
        """Add last pieces without frames, of media that no row of this step reads."""
        self.pieces += pieces
        self.unread_pages.update(piece.encoding.key for piece in pieces)


@dataclass(slots=True)
class Group:
    """Sequences that can run: those that decode, and those with a prompt to compute, whether they run or wait."""

    decoding: list[Sequence] = field(default_factory=list)
    prompts: list[Sequence] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decoding or self.prompts)
