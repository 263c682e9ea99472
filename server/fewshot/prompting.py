"""Turns a few-shot request into a prompt: a template writes its own shots or selected ones, and the query.

Every few-shot route calls `assemble`, so support sets, strategies and templates have the same meaning in all of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from model.prompt import Media, ShotsAttend
from server.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from server.fewshot.retrieval import SPACES, Search, SimilarityQuery, compared_text
from server.fewshot.shots import DEFAULT_K, SUPPORT_SET, ShotSource, check_media
from server.fewshot.templates import InvalidTemplate, Shot, Template, TemplateError, built_in, with_end
from server.media.source import EncodedMedia
from server.prompt import PreparedPrompt, check_may_attend_alone, encode_segments
from server.schemas.fewshot import (
    MAX_SHOTS,
    SELECTING,
    ExamplesFields,
    FewShotFields,
    QueryFields,
    ShotFields,
    ShotsFields,
    TemplateChoice,
)
from server.served_model import ServedModel
from server.store.examples import Examples
from server.store.records import Example, SupportSet
from server.telemetry.request_record import RequestRecord

# stands for the text of a query: only whole blocks before it stay in the prefix cache
ANY_QUERY = Shot(text="?", question="?", param="query")
# the fields of a request that a shot has, too
TEXTS = {"text", "question", "label", "id"}
NOT_ALONE = "shots that attend alone, and the query, must each begin with an image or video and have no other"
# limit of the tokens of prompts with one shot each, which are in memory together: a hundred for each of 10,000 examples
MAX_TOKENS_ALONE = 1_000_000
# the default number of shots is that of the labels, but at most this
MAX_DEFAULT_K = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A few-shot request as read: its fields, template, own shots and query, with all media by digest, and its set."""

    fields: ShotsFields
    template: Template
    shots: Examples[Shot]
    query: Shot
    media: Mapping[bytes, EncodedMedia]
    support_set: SupportSet | None

    @property
    def compared(self) -> SimilarityQuery:
        """The query in the form in which examples are compared with it."""
        media = [self.media[digest] for digest in self.query.media]
        return SimilarityQuery(media=media, text=compared_text(self.query.question, self.query.text))

    @property
    def examples(self) -> Examples[Shot | Example]:
        """All examples: the shots given, or the whole version of the support set."""
        return self.shots if self.support_set is None else self.support_set.examples

    def with_selection(self, examples: ExamplesFields, attend: ShotsAttend) -> Question:
        """Return the question with this selection of shots, unless the request itself says how to select them."""
        selection = self.fields.examples
        if selection is None or selection.model_fields_set & SELECTING:
            return self
        form = {} if "shots_attend" in self.fields.model_fields_set else {"shots_attend": attend}
        return replace(self, fields=self.fields.model_copy(update={"examples": examples, **form}))

    def with_each_label(self, num_labels: int | None = None) -> Question:
        """Return the question with a balanced number of examples per label, unless it names a strategy.

        The first examples of a set may all have one label, which the language model would then prefer. `num_labels`: those
        of the candidates, None for the labels of the examples.
        """
        selection, examples = self.fields.examples, self.examples
        if selection is None or not examples.are_labelled or "strategy" in selection.model_fields_set:
            return self
        if num_labels is None:
            num_labels = len(examples.by_answer)
        k = min(max(DEFAULT_K, num_labels), MAX_DEFAULT_K, len(examples)) if selection.k is None else selection.k
        if self.fields.zero_shot or k >= len(examples):
            return self
        balanced = selection.model_copy(update={"strategy": "balanced", "k": k})
        return replace(self, fields=self.fields.model_copy(update={"examples": balanced}))


@dataclass(frozen=True, slots=True, kw_only=True)
class AssembledPrompt:
    """The prompt of a question; `shots` are in prompt order, without the first ones that were left out."""

    question: Question
    prompt: PreparedPrompt
    shots: Sequence[Shot]
    num_left_out: int

    async def with_shots(self, shots: Sequence[Shot], model: ServedModel) -> AssembledPrompt:
        """Write the prompt again with these shots, which must show the same media."""
        question, media = self.question, self.prompt.media
        attend = question.fields.shots_attend
        prompt = await model.tokenize(write, question.template, shots, question.query, media, model, attend)
        return replace(self, prompt=prompt, shots=shots)


def record_shots(question: Question, assembled: AssembledPrompt | None, record: RequestRecord) -> None:
    """Add the shots of a question, and its support set, to the record of the request, for `usage` and the metrics.

    `assembled`: the question's prompt, None if the language model is not used.
    """
    examples, stored = question.fields.examples, question.support_set
    if assembled:
        record.strategy = examples.strategy if examples else None
        record.num_shots = max(len(assembled.shots), record.num_shots or 0)
        record.details["shots_used"] = record.num_shots
    record.details |= {"support_set": stored and stored.id, "version": stored and stored.version}


def fewshot_report(question: Question, assembled: AssembledPrompt | None) -> dict[str, Any]:
    """Return the field `fewshot` of a response; `assembled` as for `record_shots`."""
    examples, stored = question.fields.examples, question.support_set
    shots = assembled.shots if assembled else []
    return {
        "template": question.template.name,
        "strategy": examples.strategy if assembled and examples else None,
        "support_set": stored and stored.id,
        "version": stored and stored.version,
        "shots": [{"id": shot.id, "score": shot.score, "label": shot.label or None} for shot in shots],
        "shots_left_out": assembled.num_left_out if assembled else 0,
    }


async def read_question(fields: FewShotFields, model: ServedModel, source: ShotSource) -> Question:
    """Read the query of a few-shot request, its own shots, and its support set.

    Raises `InvalidRequest` that names the invalid field, and errors of the support set and of media.
    """
    owners = shots_by_param(fields)
    template = find_template(fields.template, model)
    check_fields(fields, template)
    read = await source.read_media({**({} if fields.zero_shot else owners), "query": fields.query})
    return Question(
        fields=fields,
        template=template,
        shots=Examples(as_shot(shot, param, read.get(param, ())) for param, shot in owners.items()),
        query=as_shot(fields.query, "query", read["query"]),
        media={item.digest: item for items in read.values() for item in items},
        support_set=await source.find(fields, read["query"]),
    )


def shots_by_param(fields: ShotsFields) -> dict[str, ShotFields]:
    """Return the request's own shots by their paths. Raises `InvalidRequest` if it also has a support set."""
    if fields.shots and fields.examples is not None:
        raise InvalidRequest("shots and examples exclude each other: set only one of them", param="examples")
    return {f"shots[{number}]": shot for number, shot in enumerate(fields.shots)}


def as_shot(fields: ShotFields | QueryFields, param: str, media: Sequence[EncodedMedia]) -> Shot:
    return Shot(media=tuple(item.digest for item in media), param=param, **fields.model_dump(include=TEXTS))


async def assemble(
    question: Question, model: ServedModel, source: ShotSource, *, room: int = 0, without: Collection[str] = ()
) -> AssembledPrompt:
    """Assemble the prompt of a few-shot request.

    `room`: tokens that `truncate_shots` keeps free. `without`: ids of examples that must not become shots.
    Raises `InvalidRequest` that names the invalid field, and errors of stored media and the engine.
    """
    search = None
    if question.fields.examples is not None and question.support_set is not None:
        search = await source.search(question.support_set, question.fields.examples, question.compared)
    return await model.tokenize(_assemble, question, search, model, source, room, without)


def _assemble(
    question: Question,
    search: Search | None,
    model: ServedModel,
    source: ShotSource,
    room: int,
    without: Collection[str],
) -> AssembledPrompt:
    fields, support_set = question.fields, question.support_set
    if fields.examples is None or support_set is None:
        return _fit(question, question.shots, question.media, model, room)
    shots, stored = source.select(
        support_set, fields.examples, question.template, search, is_text_only=fields.zero_shot, without=without
    )
    _check_number([*shots, question.query], source.intake.settings.max_media_per_request)
    return _fit(question, shots, {**stored, **question.media}, model, room)


def _fit(
    question: Question, shots: Sequence[Shot], media: Mapping[bytes, EncodedMedia], model: ServedModel, room: int
) -> AssembledPrompt:
    """Write the prompt with all shots or, if requested, without the first shots that exceed the model's context."""
    fields, template, query = question.fields, question.template, question.query
    num_kept, limit = len(shots), model.max_model_len

    @cache
    def with_last(number: int) -> PreparedPrompt:
        return write(template, shots[len(shots) - number :], query, media, model)

    def fits(number: int) -> bool:
        try:
            return with_last(number).num_tokens + room <= limit
        except ContextLengthExceeded:  # so many tokens that not all of them are counted
            return False

    if fields.truncate_shots and not fits(num_kept):
        num_kept = _largest(fits, num_kept)
    kept, prompt = shots[len(shots) - num_kept :], with_last(num_kept)
    if fields.shots_attend == "alone":
        prompt = _alone(prompt, template, kept, query, model)
    if prompt.num_tokens > limit:
        bare = write(template, [], query, media, model)
        of_shots = "shots" if fields.examples is None else "examples.k"
        raise ContextLengthExceeded(
            f"the prompt has {prompt.num_tokens} tokens with its {len(shots)} shots and {bare.num_tokens} without, "
            f"the model's limit is {limit}",
            param=query.param if bare.num_tokens > limit else of_shots,
        )
    return AssembledPrompt(question=question, prompt=prompt, shots=kept, num_left_out=len(shots) - num_kept)


def _largest(fits: Callable[[int], bool], end: int) -> int:
    """Return the largest number below `end` that fits, or 0. If a number fits, so do smaller ones.

    Small numbers are checked first: a check of many long shots takes long.
    """
    bound = 1
    while bound < end and fits(bound):
        bound *= 2
    return bound // 2 + bisect_left(range(bound // 2 + 1, min(bound, end)), True, key=lambda number: not fits(number))


async def assemble_prefix(
    support_set: SupportSet, choice: TemplateChoice, k: int | None, model: ServedModel, source: ShotSource
) -> PreparedPrompt:
    """Return the beginning of a prompt with the first `k` examples; None: as many as a request without `k` uses.

    All shots of a later request with the strategy "first" and the same template and `k` are then in the prefix cache.
    Raises `InvalidRequest` for examples that do not fit the template, and `ContextLengthExceeded`.
    """
    template = find_template(choice, model)
    if k is not None and k > MAX_SHOTS:
        raise InvalidRequest(f"k is {k}, the shots of a prompt are at most {MAX_SHOTS}", param="k")
    fields = ExamplesFields(support_set=support_set.id, version=support_set.version, k=k, order="stored")
    try:
        shots, media = source.select(support_set, fields, template)
        prompt = await model.tokenize(write, template, shots, ANY_QUERY, media, model)
    except InvalidRequest as error:
        error.param = "k" if error.param == "examples.k" else "template"
        raise
    if prompt.num_tokens > model.max_model_len:
        message = f"{len(shots)} shots have {prompt.num_tokens} tokens, the model's limit is {model.max_model_len}"
        raise ContextLengthExceeded(message, param="k")
    return prompt


async def assemble_shots(
    support_set: SupportSet, choice: TemplateChoice, k: int | None, model: ServedModel, source: ShotSource
) -> list[PreparedPrompt]:
    """Return a prompt with each of the first `k` examples as a shot that attends alone; None: all examples.

    The shots of any later request with the same template are then in the cache, whichever it selects.
    Raises `InvalidRequest` for examples that do not fit the template or cannot attend alone, and `ContextLengthExceeded`.
    """
    if k is not None and k > len(support_set.examples):
        raise InvalidRequest(f"k is {k}, only {len(support_set.examples)} examples can be selected", param="k")
    template, examples = find_template(choice, model), support_set.examples[:k]
    try:
        check_alone(examples, template, model)
        return await model.tokenize(_write_alone, template, examples, source, model)
    except InvalidRequest as error:
        error.param = error.param if error.param in ("shots_attend", "k") else "template"
        raise


def _write_alone(
    template: Template, examples: Sequence[Example], source: ShotSource, model: ServedModel
) -> list[PreparedPrompt]:
    """Write a prompt per example: its shot before a query of one token, which shows the same media item."""
    shots, media = source.read_examples(examples, template)
    prompts, num_tokens = list[PreparedPrompt](), 0
    for shot in shots:
        written = write(template, [shot], replace(ANY_QUERY, media=shot.media), media, model, "alone")
        prompt = replace(written, encoded=written.encoded.up_to(written.encoded.span_starts[-1] + 1))
        if prompt.num_tokens > (limit := model.max_model_len):
            message = f"the example {shot.id!r} has {prompt.num_tokens} tokens as a shot, the model's limit is {limit}"
            raise ContextLengthExceeded(message, param="template")
        num_tokens += prompt.num_tokens
        if num_tokens > MAX_TOKENS_ALONE:
            message = f"the shots of the first {len(prompts) + 1} examples have {num_tokens} tokens in all"
            raise InvalidRequest(f"{message}, the limit is {MAX_TOKENS_ALONE}", param="k")
        prompts.append(prompt)
    return prompts


def write(
    template: Template,
    shots: Sequence[Shot],
    query: Shot,
    media: Mapping[bytes, EncodedMedia],
    model: ServedModel,
    attend: ShotsAttend = "previous",
) -> PreparedPrompt:
    """Write shots in any order before any query. Raises `InvalidRequest` that names the invalid shot or example."""
    try:
        pieces = template.pieces(shots, query)
    except TemplateError as error:
        shot = query if error.shot is None else shots[error.shot]
        owner = f" (the example {shot.id!r})" if shot.param == SUPPORT_SET else ""
        raise InvalidRequest(f"{error}{owner}", param=shot.param) from None
    prompt = encode_segments(pieces, media, model, query.param, joins_texts=True)
    return prompt if attend == "previous" else _alone(prompt, template, shots, query, model)


def _alone(
    prompt: PreparedPrompt, template: Template, shots: Sequence[Shot], query: Shot, model: ServedModel
) -> PreparedPrompt:
    """Return the prompt of these shots and this query with shots that attend alone. Raises `UnsupportedParameter`."""
    if shots:
        _check_written_alone(template, shots, query)
    return prompt.alone(model)


def check_alone(examples: Sequence[Example], template: Template, model: ServedModel) -> None:
    """Check that each example can be a shot that attends alone, or a query. Raises `UnsupportedParameter`."""
    check_may_attend_alone(model)
    begins = all(text.startswith("{media}") for text in (template.shot, template.beginning))
    if not begins or any(len(example.media) != 1 for example in examples):
        raise UnsupportedParameter(NOT_ALONE, param="shots_attend")


def _check_written_alone(template: Template, shots: Sequence[Shot], query: Shot) -> None:
    """Check that each shot and the query begin with a media item and have no other. Raises `UnsupportedParameter`."""
    with_shot, alone = template.render(shots[:1], query), template.render([], query)
    begin = isinstance(with_shot[0], Media) and isinstance(alone[0], Media)
    if not begin or any(len(shot.media) != 1 for shot in shots):
        raise UnsupportedParameter(NOT_ALONE, param="shots_attend")
    if [isinstance(segment, Media) for segment in alone].count(True) != 1:
        raise UnsupportedParameter(NOT_ALONE, param=query.param)


def find_template(choice: TemplateChoice, model: ServedModel) -> Template:
    """Return the template that a request names or defines, for this model. Raises `InvalidRequest`."""
    known = built_in(model.config)
    if isinstance(choice, str):
        if choice not in known:
            raise InvalidRequest(f"unknown template {choice!r}, known are {', '.join(known)}", param="template")
        return known[choice]
    try:
        return with_end(Template(name="custom", **choice.model_dump()), model.config.prompt)
    except InvalidTemplate as error:
        raise InvalidRequest(f"template.{error}", param=f"template.{error.field}") from None


def check_fields(fields: FewShotFields, template: Template) -> None:
    """Check the query and the request's own shots before any media is read. Raises `InvalidRequest`.

    With a prompt, the query must have the media and texts of the template, and the shots their media. The query may have
    another field only if the strategy compares it.
    """
    query = fields.query
    if fields.has_prompt:
        has_media = bool(query.image or query.media)
        param, remedy = ("query", "") if has_media else ("query.image", "set query.image or query.media, or ")
        check_media(has_media, param, template, "the query", remedy=remedy)
    compares = fields.examples is not None and "text" in SPACES.get(fields.examples.strategy, ())
    for name, value in (("question", query.question), ("text", query.text)):
        if fields.has_prompt and name in template.query_fields and not value:
            message = f"the template {template.name!r} has {{{name}}}, but the query has none"
            raise InvalidRequest(message, param=f"query.{name}")
        if value and name not in template.query_fields and not compares:
            raise InvalidRequest(f"the template {template.name!r} has no {{{name}}}", param=f"query.{name}")
    for number, shot in enumerate(fields.shots):
        param = f"shots[{number}]"
        if fields.has_prompt and not fields.zero_shot:
            remedy = "set zero_shot, with which no shot has media, or "
            check_media(bool(shot.image or shot.media), param, template, param, remedy=remedy)
        if shot.question and "question" not in template.shot_fields:
            raise InvalidRequest(f"the template {template.name!r} has no {{question}}", param=f"{param}.question")


def _check_number(shots: Sequence[Shot], limit: int) -> None:
    """Check the number of media of selected shots and, last, the query; a repeated media item counts each time."""
    if (number := sum(len(shot.media) for shot in shots)) > limit:
        message = f"{number} images and videos in {len(shots) - 1} shots and the query, the limit is {limit}"
        raise InvalidRequest(message, param="examples.k")
