"""Clips of moving and flashing shapes whose class needs several frames, rendered at any number of frames.

direction   left, right, up or down; a path and its reverse have the same frames
order       one colour in the first half and another in the second; the reverse has the same frames
count       a disc is visible in one to four separate eighths of the clip
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from random import Random
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

SIZE = 32
SLOTS = 8
Family = Literal["direction", "order", "count"]
FAMILIES: tuple[Family, ...] = get_args(Family)
COLOURS = ((230, 40, 40), (40, 200, 60), (60, 90, 240), (235, 210, 50))
MAX_COUNT = 4


@dataclass(frozen=True, slots=True)
class Motion:
    """A class of clips; `variant` is a direction (axis, sign), two colours in their order, or a count."""

    family: Family
    variant: tuple[int, ...]


MOTIONS = (
    *(Motion("direction", (axis, sign)) for axis in range(2) for sign in range(2)),
    *(Motion("order", colours) for colours in permutations(range(len(COLOURS)), 2)),
    *(Motion("count", (count,)) for count in range(1, MAX_COUNT + 1)),
)


def draw_pair(family: Family, rng: Random) -> tuple[Motion, Motion]:
    """Draw the two classes of a question: a motion and its reverse, or two counts."""
    variants: list[tuple[int, ...]]
    if family == "direction":
        axis = rng.randrange(2)
        variants = [(axis, 0), (axis, 1)]
    elif family == "order":
        first, second = rng.sample(range(len(COLOURS)), 2)
        variants = [(first, second), (second, first)]
    else:
        variants = [(count,) for count in rng.sample(range(1, MAX_COUNT + 1), 2)]
    rng.shuffle(variants)
    return Motion(family, variants[0]), Motion(family, variants[1])


@dataclass(frozen=True, slots=True)
class Clip:
    """A motion, with all properties that its class does not determine."""

    motion: Motion
    colour: tuple[int, int, int]
    side: int
    start: tuple[int, int]
    length: int
    visible: frozenset[int]  # the eighths in which the disc of a count is visible

    def frames(self, num_frames: int) -> NDArray[np.uint8]:
        """Render [F, h, w, 3] at equal distances in time, from the beginning to the end."""
        return np.stack([self._frame(i / max(1, num_frames - 1)) for i in range(num_frames)])

    def _frame(self, time: float) -> NDArray[np.uint8]:
        frame = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
        variant = self.motion.variant
        if self.motion.family == "direction":
            axis, sign = variant
            moved = round(self.length * (time if sign else 1.0 - time))
            row, column = self.start
            _draw(frame, (row + moved, column) if axis else (row, column + moved), self.side, self.colour)
        elif self.motion.family == "order":
            _draw(frame, self.start, self.side, COLOURS[variant[int(time >= 0.5)]])
        elif min(SLOTS - 1, int(time * SLOTS)) in self.visible:
            _draw(frame, self.start, self.side, self.colour)
        return frame


def draw_clip(motion: Motion, rng: Random) -> Clip:
    side = rng.randint(7, 11)
    length = rng.randint(12, SIZE - side - 1)
    axis = motion.variant[0] if motion.family == "direction" else -1
    room = [SIZE - side - (length if axis == dimension else 0) for dimension in (1, 0)]
    return Clip(
        motion=motion,
        colour=rng.choice(COLOURS),
        side=side,
        start=(rng.randint(0, room[0]), rng.randint(0, room[1])),
        length=length,
        visible=frozenset(_separate_slots(motion.variant[0], rng)) if motion.family == "count" else frozenset(),
    )


def _separate_slots(count: int, rng: Random) -> list[int]:
    """Draw eighths of which no two are adjacent."""
    # a choice among the slots without gaps corresponds to exactly one with gaps
    chosen = sorted(rng.sample(range(SLOTS - count + 1), count))
    return [slot + position for position, slot in enumerate(chosen)]


def _draw(frame: NDArray[np.uint8], corner: tuple[int, int], side: int, colour: tuple[int, int, int]) -> None:
    row, column = corner
    frame[row : row + side, column : column + side] = colour
