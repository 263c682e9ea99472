"""What a checkpoint can be guilty of: asking for what is not implemented, or tensors that do not fit the model.

One error lists everything that does not fit, so that a wrong file is understood at the first try.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Shape: TypeAlias = tuple[int, ...]
# field -> the values that ask for nothing; any other is a feature that is not implemented
Neutral: TypeAlias = Mapping[str, tuple[Any, ...]]

MAX_LISTED = 20


class CheckpointError(ValueError):
    """A checkpoint that cannot become this model."""


def refuse_fields(where: str, fields: Mapping[str, Any], neutral: Neutral) -> None:
    """Raise for the first field that asks for something; a field that is absent asks for nothing."""
    for name, values in neutral.items():
        if name in fields and fields[name] not in values:
            raise CheckpointError(f"{where}{name} = {fields[name]!r} is not implemented")


def refuse_misfits(
    what: str,
    *,
    missing: Sequence[str] = (),
    unexpected: Sequence[str] = (),
    misshapen: Mapping[str, tuple[Shape, Shape]] | None = None,
) -> None:
    """Raise with all names, and both shapes of what is misshapen (found, wanted); return if there is nothing to say."""
    shapes = [
        f"{name}: found {list(found)}, wanted {list(wanted)}" for name, (found, wanted) in (misshapen or {}).items()
    ]
    complaints = [
        f"{title} ({len(lines)}): {'; '.join(_shorten(lines))}"
        for title, lines in (("missing", missing), ("unexpected", unexpected), ("misshapen", shapes))
        if lines
    ]
    if complaints:
        raise CheckpointError(f"{what} does not fit the model. " + ". ".join(complaints))


def _shorten(lines: Sequence[str]) -> list[str]:
    if len(lines) <= MAX_LISTED:
        return list(lines)
    return [*lines[:MAX_LISTED], f"and {len(lines) - MAX_LISTED} more"]
