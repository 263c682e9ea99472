"""Examples in order, with what each request asks of all of them: their answers, and whether they have media.

A version of a support set may have ten thousand examples and never changes, so this is computed once while it is cached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Protocol, TypeVar


class Answered(Protocol):
    """An example of a support set, or a shot of a request."""

    @property
    def label(self) -> str: ...

    @property
    def text(self) -> str: ...

    @property
    def media(self) -> Sequence[object]: ...


ExampleType = TypeVar("ExampleType", bound=Answered, covariant=True)


def answer_of(example: Answered) -> str:
    """Return the correct answer of an example: its label or, without one, its text."""
    return example.label or example.text


class Examples(tuple[ExampleType, ...]):
    """All examples of a version, or all shots of a request."""

    @cached_property
    def by_answer(self) -> Mapping[str, Sequence[int]]:
        """The indices of the examples by their correct answers, in order of appearance; "": those without an answer."""
        indices: dict[str, list[int]] = {}
        for index, example in enumerate(self):
            indices.setdefault(answer_of(example), []).append(index)
        return indices

    @cached_property
    def are_labelled(self) -> bool:
        """True if there are examples, and all of them have labels: these are classes, texts may be any answers."""
        return bool(self) and all(example.label for example in self)

    @cached_property
    def first_with_media(self) -> ExampleType | None:
        return next((example for example in self if example.media), None)

    @cached_property
    def first_without_media(self) -> ExampleType | None:
        return next((example for example in self if not example.media), None)
