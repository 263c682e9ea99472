"""How shots and a query are written: a template is text with named places, and rendering it gives a prompt's segments.

A place is filled once and literally. What fills it stays text, whatever it spells: only `model.prompt` writes markers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from model.config import FlamingoConfig, PromptConfig
from model.prompt import EndOfChunk, Media, Segment, Text

PLACES = ("media", "text", "question", "answer", "label")
# what a model without an end-of-chunk token reads and writes after an answer
LINE_END = "\n"

_PLACE = re.compile(r"\{(\w+)\}")


class TemplateError(ValueError):
    """A template that cannot be used, or shots that it cannot be filled with; the message is for the user.

    `shot` is the place of the shot at fault in the prompt, None if it is the query or the template itself.
    """

    def __init__(self, message: str, *, shot: int | None = None) -> None:
        super().__init__(message)
        self.shot = shot


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """A worked example. Of `text` and `label` one may be "": the other is then the answer."""

    media: tuple[bytes, ...] = ()
    text: str = ""
    question: str = ""
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What is to be answered: the last media, and what is said about them."""

    media: tuple[bytes, ...] = ()
    text: str = ""
    question: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """`shot` in full with its answer, `end` after it ("": the family's end of chunk), `separator` before what follows.

    `query` is the beginning of a shot; "" takes all of `shot` before its answer, without the spaces that lead to it.
    """

    name: str
    shot: str
    query: str = ""
    separator: str = ""
    end: str = ""

    def __post_init__(self) -> None:
        for field, text in (("shot", self.shot), ("query", self.query)):
            _check_places(field, text)
        if self._target is None:
            raise TemplateError("shot: a template's shot needs {answer}, {label} or {text} for its answer")
        if self.query and self.answer in places(self.query):
            raise TemplateError(f"query: {{{self.answer}}} is the answer, which a query does not have")
        if ("media" in places(self.beginning)) != self.has_media:
            raise TemplateError("query: {media} stands before the answer in the shot and in the query, or in neither")
        if not places(self.beginning) <= {"media", "text", "question"}:
            raise TemplateError("query: a query has {media}, {text} and {question} only")

    @property
    def answer(self) -> str:
        """The place that the answer fills: the shot's last."""
        assert self._target is not None
        return self._target.group(1)

    @property
    def beginning(self) -> str:
        """What a query is written with."""
        return self.query or self._before_answer.rstrip()

    @property
    def lead(self) -> str:
        """What stands between a query's end and its answer: the space of `Output: a cat`, which the model writes."""
        before, beginning = self._before_answer, self.beginning
        return before[len(before.rstrip()) :] if beginning == beginning.rstrip() else ""

    @property
    def has_media(self) -> bool:
        return "media" in places(self.shot)

    def render(self, shots: Sequence[Shot], query: Query) -> list[Segment]:
        """Segments of the whole prompt. Shots without media are written without: the paper's text-only examples.

        Raises `TemplateError` for a place with nothing to fill it, media apart.
        """
        segments: list[Segment] = []
        for number, shot in enumerate(shots):
            segments += self._filled(self.shot, self._values(shot), shot.media, number)
            segments += [Text(self.end) if self.end else EndOfChunk(), Text(self.separator)]
        values = {"text": query.text, "question": query.question}
        segments += self._filled(self.beginning, values, query.media, None)
        return list(_joined(segments))

    def continuation(self, answer: str) -> str:
        """A candidate as it would follow the query: scored as text, without the end."""
        return self.lead + answer

    def _values(self, shot: Shot) -> dict[str, str]:
        # a text that the template shows in its own place is not the answer
        label = shot.label or ("" if "text" in places(self.shot) else shot.text)
        return {"text": shot.text, "question": shot.question, "answer": shot.text or shot.label, "label": label}

    def _filled(
        self, template: str, values: Mapping[str, str], media: Sequence[bytes], shot: int | None
    ) -> Iterator[Segment]:
        for number, piece in enumerate(_PLACE.split(template)):
            if number % 2 == 0:
                yield Text(piece)
            elif piece == "media":
                yield from map(Media, media)
            elif values[piece]:
                yield Text(values[piece])
            else:
                who = "the query" if shot is None else f"shot {shot}"
                raise TemplateError(f"the template {self.name!r} shows {{{piece}}}, and {who} has none", shot=shot)

    @property
    def _before_answer(self) -> str:
        assert self._target is not None
        return self.shot[: self._target.start()]

    @property
    def _target(self) -> re.Match[str] | None:
        found = [match for match in _PLACE.finditer(self.shot) if match.group(1) in ("answer", "label", "text")]
        return found[-1] if found else None


def places(template: str) -> set[str]:
    return set(_PLACE.findall(template))


def _check_places(field: str, template: str) -> None:
    if unknown := sorted(places(template) - set(PLACES)):
        known = " ".join(f"{{{place}}}" for place in PLACES)
        raise TemplateError(f"{field}: there is no place {{{unknown[0]}}}, only {known}")
    counts = Counter(_PLACE.findall(template))
    if twice := next((place for place, count in counts.items() if count > 1), None):
        # else a short template could make a long text of every word that it is filled with
        raise TemplateError(f"{field}: {{{twice}}} may stand once")


def _joined(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Neighbouring texts as one: families that trim a text, or put a token between two, see what the template shows."""
    for is_text, run in groupby(segments, key=lambda segment: isinstance(segment, Text)):
        if not is_text:
            yield from run
        elif text := "".join(segment.text for segment in run if isinstance(segment, Text)):
            yield Text(text)


# as the paper writes them: what the default model has been trained on
PAPER = (
    Template(name="caption", shot="{media}Output: {answer}"),
    Template(name="vqa", shot="{media}Question: {question} Answer: {answer}"),
    Template(name="classification", shot="{media}Output: {label}"),
)
# what OpenFlamingo's checkpoints were measured with: no space before an answer, lines between shots
OPENFLAMINGO = (
    Template(name="caption", shot="{media}Output:{answer}", separator="\n"),
    Template(name="vqa", shot="{media}Question:{question} Short answer:{answer}", separator="\n"),
    Template(name="classification", shot="{media}Output:{label}"),
)


def built_in(config: FlamingoConfig) -> dict[str, Template]:
    """By name, as this model's family writes them."""
    family = OPENFLAMINGO if config.family == "openflamingo" else PAPER
    return {template.name: template for template in family}


def with_end(template: Template, prompt: PromptConfig) -> Template:
    """The template for a model that may have no end-of-chunk token: there an answer ends with its line."""
    if template.end or prompt.end_of_chunk:
        return template
    return replace(template, end=LINE_END)
