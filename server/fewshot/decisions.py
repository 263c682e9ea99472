"""Turns a decision into few-shot questions: the input is the query, and each question has instructions and candidates.

With the template "vqa" of the default model, an image as input, and a choice between two described values, the prompt

    <image>Question: Which animal?
    cat: It meows.
    dog: It barks. Answer:

is continued by " cat" or " dog". Texts and images of the input come before the question, in the order of the request. A
shot is written like the query: its media and its own question as the input, then the same instructions, then its answer.

Examples are used only for questions that they answer: those with a candidate that is the answer of an example. Other
questions are asked without shots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as fields_of

from model.prompt import Media, Segment, Text
from server.errors import InvalidRequest
from server.fewshot.candidates import Candidate
from server.fewshot.methods import IN_CONTEXT
from server.fewshot.passages import INPUT, Passage, read_input, read_instructions
from server.fewshot.prompting import Question, as_shot, find_template, shots_by_param
from server.fewshot.shots import SUPPORT_SET, ShotSource, place_of
from server.fewshot.templates import LINE_END, Shot, Template
from server.media.source import EncodedMedia
from server.schemas.decisions import ChoiceQuestion, DecisionQuestion, DecisionRequest
from server.served_model import ServedModel
from server.store.examples import Examples, answer_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedQuestion:
    """A question as the request has it: its path, its instructions, and its candidates in their order."""

    param: str
    fields: DecisionQuestion
    instructions: Passage
    candidates: list[Candidate]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A question of a decision as a few-shot question, and its method. `has_examples`: the examples answer it."""

    parsed: ParsedQuestion
    question: Question
    method: str
    has_examples: bool


@dataclass(frozen=True, kw_only=True)
class Instructed(Template):
    """A template that writes the same instructions for every shot and for the query, instead of their own questions.

    The question of a shot is written as text of its input. `shows_media`: the input has media, so each shot must have
    some. `leading`: the media of the instructions, which come before those of the query, so that later text reads the
    query's media.
    """

    instructions: str
    shows_media: bool
    leading: tuple[Segment, ...]

    @property
    def has_media(self) -> bool:
        return self.shows_media

    def pieces(self, shots: Sequence[Shot], query: Shot) -> list[Segment]:
        last = self._with_instructions(query)
        last = replace(last, content=(*self.leading, *last.content))
        return super().pieces([self._with_instructions(shot) for shot in shots], last)

    def _with_instructions(self, shot: Shot) -> Shot:
        lines = [Text(shot.question + LINE_END)] if shot.question else []
        content = shot.content or (*map(Media, shot.media), *lines)
        # an example may also have a text, but a candidate is compared with its label
        return replace(shot, question=self.instructions, content=content, text=answer_of(shot))


async def read_decisions(fields: DecisionRequest, model: ServedModel, source: ShotSource) -> list[Decision]:
    """Read the input of a decision, its questions, its own shots, and its support set.

    Raises `InvalidRequest` that names the invalid field, and errors of the support set and of media.
    """
    template, shots = find_template(fields.template, model), shots_by_param(fields)
    _check_places(template)
    passage = read_input(fields.input)
    parsed = [_read_question(question, f"questions[{index}]") for index, question in enumerate(fields.questions)]
    owners = {INPUT: passage, **{each.param: each.instructions for each in parsed}}
    media = await source.read_media({**({} if fields.zero_shot else shots), **owners}, INPUT)
    question = Question(
        fields=fields,
        template=template,
        shots=Examples(as_shot(shot, param, media.get(param, ())) for param, shot in shots.items()),
        query=Shot(
            media=tuple(item.digest for item in media[INPUT]),
            content=passage.segments(media[INPUT]),
            question=passage.text,
            param=INPUT,
        ),
        media={item.digest: item for items in media.values() for item in items},
        support_set=await source.find(fields, media[INPUT]),
    )
    decisions = [_decision(question, each, media[each.param], fields) for each in parsed]
    _check_examples(question, decisions, fields)
    return decisions


def _check_places(template: Template) -> None:
    """Check that a template has places for the input and for the instructions. Raises `InvalidRequest`."""
    for name, content in (("media", "the input"), ("question", "the instructions")):
        if name not in template.query_fields:
            message = f"the template {template.name!r} has no {{{name}}}, which {content} would replace"
            raise InvalidRequest(message, param="template")


def _read_question(fields: DecisionQuestion, param: str) -> ParsedQuestion:
    """Read a question. Raises `InvalidRequest` if it has no instructions, or two equal candidates."""
    instructions = read_instructions(fields.instructions, f"{param}.instructions")
    candidates = [Candidate(answer.text, answer.text, param=param + answer.path) for answer in fields.answers]
    seen: dict[str, str] = {}
    for candidate in candidates:
        if (first := seen.setdefault(candidate.text, candidate.param)) != candidate.param:
            raise InvalidRequest(f"{candidate.text[:80]!r} is also the text of {first}", param=candidate.param)
    return ParsedQuestion(param=param, fields=fields, instructions=instructions, candidates=candidates)


def _decision(
    question: Question, parsed: ParsedQuestion, media: Sequence[EncodedMedia], fields: DecisionRequest
) -> Decision:
    """Return a question with its template, and with the examples of the request if they answer it."""
    answers = question.examples.by_answer
    has_examples = any(candidate.text in answers for candidate in parsed.candidates)
    if not has_examples:
        bare = fields.model_copy(update={"examples": None})
        question = replace(question, shots=Examples(), support_set=None, fields=bare)
    is_by_examples = has_examples and isinstance(parsed.fields, ChoiceQuestion)
    return Decision(
        parsed=parsed,
        question=replace(question, template=_instructed(question, parsed, media)),
        method=fields.method_or_default if is_by_examples else IN_CONTEXT,
        has_examples=has_examples,
    )


def _instructed(question: Question, parsed: ParsedQuestion, media: Sequence[EncodedMedia]) -> Instructed:
    """Return the template of a question: its instructions and, if any is described, its candidates."""
    return Instructed(
        **{field.name: getattr(question.template, field.name) for field in fields_of(Template)},
        instructions=LINE_END.join([parsed.instructions.text, *_described(parsed)]),
        shows_media=bool(question.query.media),
        leading=tuple(Media(item.digest) for item in media),
    )


def _described(parsed: ParsedQuestion) -> list[str]:
    """Return a line per candidate, or none if no candidate has a description."""
    answers = parsed.fields.answers
    if not any(answer.description for answer in answers):
        return []
    return [f"{each.text}: {each.description}" if each.description else each.text for each in answers]


def _check_examples(question: Question, decisions: Sequence[Decision], fields: DecisionRequest) -> None:
    """Check that the examples, and a method that compares them, answer a question. Raises `InvalidRequest`."""
    if (fields.shots or fields.examples) and not any(decision.has_examples for decision in decisions):
        message = "no question has a candidate that is the answer of an example"
        raise InvalidRequest(message, param="shots" if fields.shots else SUPPORT_SET)
    method = fields.method_or_default
    if method not in ("auto", IN_CONTEXT) and all(decision.method != method for decision in decisions):
        message = (
            f"{method} needs a question that is a choice with the answer of an example as a value, but there is none"
        )
        raise InvalidRequest(message, param="method")
    if not fields.zero_shot:
        _check_same_media(question)


def _check_same_media(question: Question) -> None:
    """Check that all examples show media if the input does, and none if it does not. Raises `InvalidRequest`."""
    examples, has_media = question.examples, bool(question.query.media)
    if (example := examples.first_without_media if has_media else examples.first_with_media) is not None:
        path, name = place_of(example)
        shows, lacks = ("the input", name) if has_media else (name, "the input")
        raise InvalidRequest(f"{shows} has images, but {lacks} has none", param=path)
