"""Mutates bytes and JSON values with a seeded random generator: an input number always gives the same input."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

MAX_MUTATIONS = 8
MAX_LENGTH = 2**20
DEPTH = 2000
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
WIDTHS = (1, 2, 4, 8)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, -(2**31) - 1, 2**63, -(2**63) - 1, 10**40, 0.5, 1e308, 5e-324, -0.0),
    *("", "a", "\0", "\ud7ff", "\U0001f600", "-1", "nan", "../../etc/passwd", "<image>", "x" * 5000, "{", "%s%n"),
    *([], {}, [[]], [None], {"": None}, [0] * 1000, {"a": {"b": {"c": 1}}}),
)


def mutate(data: bytes, rng: random.Random, samples: Sequence[bytes] = ()) -> bytes:
    """Return the bytes with a few changes; some of the changes take a piece of another sample."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, MAX_MUTATIONS)):
        rng.choice(CHANGES)(changed, rng, samples or (data,))
    return bytes(changed[:MAX_LENGTH])


def _position(data: bytearray, rng: random.Random) -> int:
    """Return a random position in the data, mostly near the beginning, where most formats have their header."""
    end = len(data) if rng.random() < 0.6 else min(len(data), 256)
    return rng.randrange(end + 1)


def _piece(data: Sequence[int], rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + int(2 ** rng.uniform(0, 10)))


def _flip(data: bytearray, rng: random.Random, _samples: Sequence[bytes]) -> None:
    if data:
        data[min(_position(data, rng), len(data) - 1)] ^= 1 << rng.randrange(8)


def _set_number(data: bytearray, rng: random.Random, _samples: Sequence[bytes]) -> None:
    width, position = rng.choice(WIDTHS), _position(data, rng)
    number = (rng.choice(NUMBERS) + rng.choice((-1, 0, 1))) % 256**width
    order: Any = rng.choice(("big", "little"))
    data[position : position + width] = number.to_bytes(width, order)


def _insert(data: bytearray, rng: random.Random, _samples: Sequence[bytes]) -> None:
    position = _position(data, rng)
    data[position:position] = rng.randbytes(rng.randint(1, 16))


def _delete(data: bytearray, rng: random.Random, _samples: Sequence[bytes]) -> None:
    start, end = _piece(data, rng)
    del data[start:end]


def _repeat(data: bytearray, rng: random.Random, _samples: Sequence[bytes]) -> None:
    start, end = _piece(data, rng)
    data[end:end] = data[start:end] * rng.choice((1, 2, 50))


def _cut(data: bytearray, rng: random.Random, _samples: Sequence[bytes]) -> None:
    del data[_position(data, rng) :]


def _splice(data: bytearray, rng: random.Random, samples: Sequence[bytes]) -> None:
    other = rng.choice(samples)
    start, end = _piece(other, rng)
    position = _position(data, rng)
    data[position : position + rng.choice((0, end - start))] = other[start:end]


Change = Callable[[bytearray, random.Random, Sequence[bytes]], None]
CHANGES: tuple[Change, ...] = (_flip, _flip, _set_number, _set_number, _insert, _delete, _repeat, _cut, _splice)


def mutate_json(value: Any, rng: random.Random) -> bytes:
    """Return JSON, in most cases well-formed, of a value with a few changes."""
    changed = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, MAX_MUTATIONS // 2)):
        changed = _change(changed, rng)
    text = json.dumps(changed, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.03:
        text = _nested(rng)
    return mutate(text, rng) if rng.random() < 0.15 else text


def _change(value: Any, rng: random.Random) -> Any:
    """Return a value with one change at a random depth."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(sorted(value))
        if rng.random() < 0.1:
            del value[name]
        elif rng.random() < 0.1:
            value[rng.choice(("", name + "x", "__class__", "n" * 200))] = copy.deepcopy(value[name])
        else:
            value[name] = _change(value[name], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.7:
        position = rng.randrange(len(value))
        if rng.random() < 0.2:
            value[position:position] = [copy.deepcopy(value[position]) for _ in range(rng.choice((1, 3, 200)))]
        else:
            value[position] = _change(value[position], rng)
        return value
    return copy.deepcopy(rng.choice((*VALUES, rng.uniform(-2, 2), rng.randrange(-10, 100))))


def _nested(rng: random.Random) -> bytes:
    depth = rng.randrange(1, DEPTH)
    start, end = rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'{"prompt":[', b"]}")))
    return start * depth + b"0" + end * rng.choice((0, depth))
