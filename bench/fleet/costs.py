"""The costs of an engine's steps: a table of measured seconds, read from a file that names the machine.

A table for a machine that was not measured can also be in a file; its field `is_measured` must be false.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("costs.json")
Points = tuple[tuple[int, float], ...]
TABLES = ("decode", "prompt", "images")
SCALARS = ("page", "request", "transfer", "ray_request", "ray_idle_cores")


class CostsError(ValueError):
    """Raised for a file that is not a table of costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """The seconds of a replica's work.

    `decode` has the seconds of a step by the number of decoding rows, `prompt` those of a prompt by its tokens, and
    `images` those of encoding in one step by the number of images. `page` is for a page from visual tokens in host memory.
    Over HTTP a request takes `request` more than in the engine, and each encoded image `transfer` more. Through Ray it
    takes `ray_request` instead of `request`, and an idle fleet occupies `ray_idle_cores` cores; both are 0 if not measured.
    """

    decode: Points
    prompt: Points
    images: Points
    page: float
    request: float
    transfer: float
    ray_request: float = 0.0
    ray_idle_cores: float = 0.0
    is_measured: bool = True
    conditions: Mapping[str, Any] = field(default_factory=dict)
    _forward: dict[tuple[int, int], float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def forward(self, rows: int, tokens: int) -> float:
        """Return the seconds of a forward pass over rows that decode and tokens of prompts; both read the weights once."""
        seconds = self._forward.get((rows, tokens))
        if seconds is None:
            seconds = self._forward[rows, tokens] = self._seconds(rows, tokens)
        return seconds

    def _seconds(self, rows: int, tokens: int) -> float:
        decode = interpolate(self.decode, rows) if rows else 0.0
        prompt = interpolate(self.prompt, tokens) if tokens else 0.0
        shared = min(self.decode[0][1], self.prompt[0][1]) if rows and tokens else 0.0
        return decode + prompt - shared

    def media(self, images: int, pages: int) -> float:
        """Return the seconds of images that are read, decoded and encoded, and of pages from visual tokens."""
        encoding = interpolate(self.images, images) + images * self.transfer if images else 0.0
        return encoding + pages * self.page

    def through_ray(self) -> Costs:
        """Return the costs of requests that come through Ray. Raises `CostsError` if they were not measured."""
        if not self.ray_request:
            raise CostsError("the costs of a request through Ray were not measured: `--measure-ray` measures them")
        return replace(self, request=self.ray_request)

    @property
    def per_image(self) -> float:
        """The seconds of one more image in a step."""
        return self.media(2, 0) - self.media(1, 0)

    @property
    def per_token(self) -> float:
        """The seconds of one more token in a long prompt."""
        (fewer, less), (more, longer) = self.prompt[-2:]
        return (longer - less) / (more - fewer)


def interpolate(points: Points, at: int) -> float:
    """Return the value of a piecewise linear function, extrapolated from its first and last pieces."""
    counts = [count for count, _ in points]
    right = min(max(bisect_left(counts, at), 1), len(points) - 1)
    (low, less), (high, more) = points[right - 1], points[right]
    return less + (more - less) * (at - low) / (high - low)


def load(file: Path, name: str) -> Costs:
    """Return a table of a file, by name. Raises `CostsError`."""
    tables = load_all(file)
    if name not in tables:
        raise CostsError(f"{file} has no table {name!r}; it has {', '.join(map(repr, tables))}")
    return tables[name]


def load_all(file: Path) -> dict[str, Costs]:
    try:
        return {name: parse(fields) for name, fields in json.loads(file.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CostsError(f"{file} is not a table of costs: {error}") from None


def save(file: Path, name: str, costs: Costs) -> None:
    """Add a table to a file, or replace the one with its name."""
    tables = load_all(file) if file.exists() else {}
    tables[name] = costs
    text = json.dumps({name: as_json(table) for name, table in tables.items()}, indent=1)
    file.write_text(text + "\n", encoding="utf-8")


def as_json(costs: Costs) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(costs).items() if not name.startswith("_")}
    points = {name: {str(count): seconds for count, seconds in fields[name]} for name in TABLES}
    return {**fields, **points}


def parse(fields: Mapping[str, Any]) -> Costs:
    points = {name: _points(name, fields[name]) for name in TABLES}
    if not isinstance(fields["is_measured"], bool):
        raise ValueError("is_measured must be true or false")
    return Costs(**{**fields, **points})


def _points(name: str, values: Mapping[str, float]) -> Points:
    points = tuple(sorted((int(count), float(seconds)) for count, seconds in values.items()))
    if len(points) < 2:
        raise ValueError(f"{name} needs the seconds of at least two counts")
    return points


def constant(seconds: float) -> Costs:
    """Return the costs of a server that only takes a constant time per image, for comparison with theory."""
    free, images = ((1, 0.0), (2, 0.0)), ((1, seconds), (2, 2 * seconds))
    return Costs(decode=free, prompt=free, images=images, page=0.0, request=0.0, transfer=0.0, is_measured=False)


def mean(tables: Sequence[Costs]) -> Costs:
    """Return the mean of tables that were measured at the same time, with the conditions of the first."""

    def average(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    def points(name: str) -> Points:
        columns = zip(*(getattr(table, name) for table in tables), strict=True)
        return tuple((column[0][0], average([seconds for _, seconds in column])) for column in columns)

    values: dict[str, Any] = {name: points(name) for name in TABLES}
    values |= {name: average([getattr(table, name) for table in tables]) for name in SCALARS}
    return Costs(**values, conditions=tables[0].conditions)
