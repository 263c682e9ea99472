"""Templates of shots and queries: text with named placeholders, rendered as a prompt's segments.

A value replaces its placeholder literally and stays text, even if it spells a marker: only `model.prompt` writes markers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

from model.config import FlamingoConfig, PromptConfig
from model.prompt import EndOfChunk, Media, Segment, Text
from server.prompt import join_texts

PLACEHOLDERS = ("media", "text", "question", "answer", "label")
# the last of these placeholders in a shot is its answer
ANSWERS = ("answer", "label", "text")
# ends an answer of a model without an end-of-chunk token
LINE_END = "\n"

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


class TemplateError(ValueError):
    """Shots that a template cannot write; `shot` is the index of the invalid shot, None for the query."""

    def __init__(self, message: str, *, shot: int | None) -> None:
        super().__init__(message)
        self.shot = shot


class InvalidTemplate(ValueError):
    """A template with an invalid field, whose name is `field`."""

    def __init__(self, field: str, fault: str) -> None:
        super().__init__(f"{field}: {fault}")
        self.field = field


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """An example as it appears in a prompt; the query is a shot without an answer.

    `text` or `label` may be empty: the other is then the answer. `content`, media and texts in order, is written instead of
    `media` if present. `score` is the similarity to the query, for strategies that compare, and `param` the path in the
    request, for error messages.
    """

    media: tuple[bytes, ...] = ()
    content: tuple[Segment, ...] = ()
    text: str = ""
    question: str = ""
    label: str = ""
    id: str | None = None
    score: float | None = None
    param: str = ""


@dataclass(frozen=True, kw_only=True)
class Template:
    """The text of a shot with its answer, the end of an answer (empty: the end-of-chunk token), and the separator of shots.

    `query` is the text of a query; if empty, it is `shot` up to the answer, without the spaces before the answer.
    """

    name: str
    shot: str
    query: str = ""
    separator: str = ""
    end: str = ""

    def __post_init__(self) -> None:
        for field, text in (("shot", self.shot), ("query", self.query)):
            _check_placeholders(field, text)
        answers = [name for name in _PLACEHOLDER.findall(self.shot) if name in ANSWERS]
        if not answers:
            raise InvalidTemplate("shot", "{answer}, {label} or {text} is required for the answer")
        # without `query`, the shot up to its answer is the query
        of_query = "query" if self.query else "shot"
        if self.query and answers[-1] in self.query_fields:
            raise InvalidTemplate("query", f"{{{answers[-1]}}} is the answer, which a query does not have")
        if ("media" in self.query_fields) != ("media" in self.shot_fields):
            fault = "{media} must come before the answer in both the shot and the query, or in neither"
            raise InvalidTemplate(of_query, fault)
        if not self.query_fields <= {"media", "text", "question"}:
            raise InvalidTemplate(of_query, "only {media}, {text} and {question} are allowed in a query")

    @cached_property
    def beginning(self) -> str:
        """The text of a query, with its placeholders."""
        return self.query or self._before_answer.rstrip()

    @cached_property
    def lead(self) -> str:
        """The text between a query's end and its answer: the space of `Output: a cat`, which the model writes."""
        before, beginning = self._before_answer, self.beginning
        return before[len(before.rstrip()) :] if beginning == beginning.rstrip() else ""

    @cached_property
    def shot_fields(self) -> frozenset[str]:
        """The placeholders of a shot."""
        return frozenset(_PLACEHOLDER.findall(self.shot))

    @cached_property
    def query_fields(self) -> frozenset[str]:
        """The placeholders of a query."""
        return frozenset(_PLACEHOLDER.findall(self.beginning))

    @property
    def has_media(self) -> bool:
        return "media" in self.shot_fields

    def render(self, shots: Sequence[Shot], query: Shot) -> list[Segment]:
        """Return the segments of the whole prompt, with adjacent texts joined. Raises what `pieces` raises."""
        return join_texts(self.pieces(shots, query))

    def pieces(self, shots: Sequence[Shot], query: Shot) -> list[Segment]:
        """Return the segments of the whole prompt before texts are joined: no text is copied, however often it is written.

        Shots may lack media: the paper's text-only examples. Raises `TemplateError` for any other placeholder without a
        value.
        """
        end = [Text(self.end) if self.end else EndOfChunk(), Text(self.separator)]
        segments: list[Segment] = []
        for number, shot in enumerate(shots):
            segments += [*self._filled(self.shot, shot, number), *end]
        return [*segments, *self._filled(self.beginning, query, None)]

    def _filled(self, template: str, shot: Shot, number: int | None) -> Iterator[Segment]:
        # a text that has its own placeholder is not the answer
        label = shot.label or ("" if "text" in self.shot_fields else shot.text)
        values = {"text": shot.text, "question": shot.question, "answer": shot.text or shot.label, "label": label}
        for index, piece in enumerate(_PLACEHOLDER.split(template)):
            if index % 2 == 0:
                yield Text(piece)
            elif piece == "media":
                yield from shot.content or map(Media, shot.media)
            elif values[piece]:
                yield Text(values[piece])
            else:
                raise TemplateError(self._lack(piece, number), shot=number)

    def _lack(self, piece: str, number: int | None) -> str:
        """Say which value of a placeholder is missing; shots with labels alone suit the template `classification`."""
        owner = "the query" if number is None else f"shot {number}"
        advice = ": give the examples questions, or use the template 'classification', as `classify` does"
        hint = "" if number is None or piece != "question" else advice
        return f"the template {self.name!r} has {{{piece}}}, but {owner} has none{hint}"

    @property
    def _before_answer(self) -> str:
        return self.shot[: max(self.shot.rfind(f"{{{name}}}") for name in ANSWERS)]


def _check_placeholders(field: str, template: str) -> None:
    counts = Counter(_PLACEHOLDER.findall(template))
    if unknown := sorted(counts.keys() - set(PLACEHOLDERS)):
        known = " ".join(f"{{{name}}}" for name in PLACEHOLDERS)
        raise InvalidTemplate(field, f"unknown placeholder {{{unknown[0]}}}, known are {known}")
    if repeated := next((name for name, count in counts.items() if count > 1), None):
        # otherwise a short template could repeat a long text many times
        raise InvalidTemplate(field, f"{{{repeated}}} may occur only once")


# as the paper writes them; the default model is trained on these
PAPER = (
    Template(name="caption", shot="{media}Output: {answer}"),
    Template(name="vqa", shot="{media}Question: {question} Answer: {answer}"),
    Template(name="classification", shot="{media}Output: {label}"),
)
# as OpenFlamingo's evaluation writes them: no space before an answer, a line break between shots
OPENFLAMINGO = (
    Template(name="caption", shot="{media}Output:{answer}", separator="\n"),
    Template(name="vqa", shot="{media}Question:{question} Short answer:{answer}", separator="\n"),
    Template(name="classification", shot="{media}Output:{label}"),
)


@cache
def built_in(config: FlamingoConfig) -> dict[str, Template]:
    """Return the built-in templates by name, as this model's family writes them."""
    family = OPENFLAMINGO if config.family == "openflamingo" else PAPER
    return {template.name: with_end(template, config.prompt) for template in family}


def with_end(template: Template, prompt: PromptConfig) -> Template:
    """Return the template for a model; without an end-of-chunk token, a line break ends an answer."""
    if template.end or prompt.end_of_chunk:
        return template
    return replace(template, end=LINE_END)
