"""Turns a conversation into a few-shot prompt: each question with its answer is a shot, the last question the query.

A Flamingo is not trained to chat, so it has no chat template. With the template "plain" this

    system     Name the animal.
    user       [image 1] What is this?
    assistant  a cat
    user       What is this? [image 2]

is written as follows, for a family with an end-of-chunk token (others end the line instead):

    Name the animal.
    <image 1>What is this? a cat<|endofchunk|><image 2>What is this?

and the model continues with " a dog", whose space belongs to the template. Text and media keep their order, except that
media after the last text of a turn move before that text, because text reads the media before it. The templates of few-shot
requests (`caption`, `vqa`) write the same turns in their own way: the user's text is the question. Without an answer before
it, a question about one image or video is written as `vqa` by default, unless it ends in a colon: nothing else shows the
model that an answer follows.

A function call is written as its arguments. Without a result, it is an answer. If its result follows, both become part of
the question, and the next answer completes the shot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from model.config import FlamingoConfig
from model.prompt import EndOfChunk, Media, Segment, Text
from server.errors import InvalidRequest
from server.fewshot.passages import PositionedMedia
from server.fewshot.templates import LINE_END, Shot, Template, TemplateError, built_in, with_end
from server.media.intake import Intake
from server.prompt import PreparedPrompt, encode_segments, join_texts
from server.schemas.generation import (
    AssistantMessage,
    InputImagePart,
    InputTextPart,
    Message,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from server.schemas.prompt import TextPart, Written
from server.served_model import ServedModel

PLAIN = Template(name="plain", shot="{media}{question} {answer}")
# for a question that already ends in a space
PLAIN_UNSPACED = Template(name="plain", shot="{media}{question}{answer}")
# at the end of a text that leads to its answer; the second is the Chinese one
COLONS = (":", "\N{FULLWIDTH COLON}")
# the template of a question that follows no answer
FIRST_QUESTION = "vqa"


@dataclass(slots=True)
class Turn:
    """Text and media of a user's turn, and the answer to it, both in pieces; the query has no answer."""

    pieces: list[str | PositionedMedia] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    def add_result(self, result: str) -> None:
        """Append the call, which was the answer so far, and its result to the question."""
        self.pieces += [LINE_END + text for text in (self.answer, result) if text]
        self.answers = []

    @property
    def content(self) -> list[str | PositionedMedia]:
        """The content, in which adjacent texts are joined."""
        content: list[str | PositionedMedia] = []
        for is_text, run in groupby(self.pieces, key=lambda piece: isinstance(piece, str)):
            if not is_text:
                content += run
            elif text := "".join(piece for piece in run if isinstance(piece, str)):
                content.append(text)
        return content

    @property
    def answer(self) -> str:
        return "".join(self.answers)

    @property
    def text(self) -> str:
        return "\n".join(item for item in self.content if isinstance(item, str))

    @property
    def media(self) -> list[PositionedMedia]:
        return [item for item in self.content if isinstance(item, PositionedMedia)]

    @property
    def is_bare_question(self) -> bool:
        """True for a media item with one text that leads to no answer itself, as "Answer:" does."""
        texts = [item.rstrip() for item in self.content if isinstance(item, str) and not item.isspace()]
        return len(self.media) == len(texts) == 1 and not texts[0].endswith(COLONS)


@dataclass(frozen=True, slots=True)
class Conversation:
    system: str
    shots: list[Turn]
    query: Turn


async def prepare_chat(
    messages: Sequence[Message], template: str | None, model: ServedModel, intake: Intake
) -> tuple[PreparedPrompt, Template]:
    """Return the prompt of a conversation, and its template, which determines the lead and the end of an answer.

    Raises `InvalidRequest` or `MediaNotFound`, which name the invalid field.
    """
    conversation = read_conversation(messages)
    parts = {item.param: item.part for turn in [*conversation.shots, conversation.query] for item in turn.media}
    media = await intake.read_all(parts, "messages")
    chosen = template_of(template, conversation, model.config)
    segments = lay_out(conversation, chosen, {param: item.digest for param, item in media.items()})
    by_digest = {item.digest: item for item in media.values()}
    return await model.tokenize(encode_segments, segments, by_digest, model, "messages"), chosen


def read_conversation(messages: Sequence[Message]) -> Conversation:
    """Read messages as turns; adjacent messages of one role are joined.

    Raises `InvalidRequest` for roles out of order, and for messages of one role with different names.
    """
    _check_names(messages)
    system: list[str] = []
    turns: list[Turn] = []
    calls: set[str] = set()
    previous: Message | None = None
    for index, message in enumerate(messages):
        match message:
            case SystemMessage():
                if turns:
                    raise _out_of_order(index, "a system message must come before all others")
                system.append(_text(message.content))
            case ToolMessage():
                if message.tool_call_id not in calls:
                    text = f"no earlier message has a tool call with the id {message.tool_call_id!r}"
                    raise InvalidRequest(text, param=f"messages[{index}].tool_call_id")
                turns[-1].add_result(_text(message.content))
            case UserMessage():
                is_next = isinstance(previous, UserMessage | ToolMessage)
                if not is_next:
                    turns.append(Turn())
                turns[-1].pieces += [LINE_END] * is_next + _content(message, f"messages[{index}].content")
            case AssistantMessage():
                if not turns:
                    raise _out_of_order(index, "an assistant's message must follow a user's")
                turns[-1].answers += [LINE_END] * isinstance(previous, AssistantMessage) + [_answer(message)]
                calls |= {call.id for call in message.tool_calls}
        previous = message
    if not isinstance(previous, UserMessage | ToolMessage):
        raise _out_of_order(len(messages) - 1, "the last message must have the role user or tool")
    return Conversation("\n".join(system), turns[:-1], turns[-1])


def _check_names(messages: Sequence[Message]) -> None:
    names: dict[type, str | None] = {}
    for index, message in enumerate(messages):
        if isinstance(message, ToolMessage):
            continue
        first = names.setdefault(type(message), message.name)
        if message.name != first:
            both = " and ".join("none" if name is None else repr(name) for name in (first, message.name))
            text = f"messages of one role have the names {both}; the prompt shows no names, so all must have the same"
            raise InvalidRequest(text, param=f"messages[{index}].name")


def template_of(name: str | None, conversation: Conversation, config: FlamingoConfig) -> Template:
    """Return the template of this name, or the default one of a conversation.

    Raises `InvalidRequest` if this model's family has no such template.
    """
    known, query = built_in(config), conversation.query
    if name is None:
        name = FIRST_QUESTION if not conversation.shots and query.is_bare_question else PLAIN.name
    if name == PLAIN.name:
        return with_end(PLAIN if _gap(query) else PLAIN_UNSPACED, config.prompt)
    if name not in known:
        names = ", ".join([PLAIN.name, *known])
        raise InvalidRequest(f"unknown template {name!r}, known are {names}", param="template")
    return known[name]


def lay_out(conversation: Conversation, template: Template, digests: Mapping[str, bytes]) -> list[Segment]:
    """Return the prompt's segments; `digests` has the digest of each media item by its path. Raises `InvalidRequest`."""
    system: list[Segment] = [Text(conversation.system + LINE_END)] if conversation.system else []
    if template.name == PLAIN.name:
        end = Text(template.end) if template.end else EndOfChunk()
        rest = [segment for turn in conversation.shots for segment in _plain_shot(turn, digests, end)]
        rest += _plain_question(conversation.query, digests)
    else:
        rest = _render(template, conversation, digests)
    return join_texts([*system, *rest])


def _render(template: Template, conversation: Conversation, digests: Mapping[str, bytes]) -> list[Segment]:
    shots = [Shot(media=_media(turn, digests), question=turn.text, text=turn.answer) for turn in conversation.shots]
    query = Shot(media=_media(conversation.query, digests), question=conversation.query.text)
    try:
        return template.render(shots, query)
    except TemplateError as error:
        raise InvalidRequest(str(error), param="messages") from None


def _media(turn: Turn, digests: Mapping[str, bytes]) -> tuple[bytes, ...]:
    return tuple(digests[item.param] for item in turn.media)


def _plain_shot(turn: Turn, digests: Mapping[str, bytes], end: Segment) -> Iterator[Segment]:
    yield from _plain_question(turn, digests)
    yield Text(("" if turn.answer[:1].isspace() else _gap(turn)) + turn.answer)
    yield end


def _plain_question(turn: Turn, digests: Mapping[str, bytes]) -> Iterator[Segment]:
    for item in _media_first(turn.content):
        yield Text(item) if isinstance(item, str) else Media(digests[item.param])


def _media_first(content: Sequence[str | PositionedMedia]) -> list[str | PositionedMedia]:
    """Move media that follow the last text before it."""
    last = max((index for index, item in enumerate(content) if isinstance(item, str)), default=-1)
    return [*content[: max(last, 0)], *content[last + 1 :], *content[max(last, 0) : last + 1]]


def _gap(turn: Turn) -> str:
    """Return the text between the question and its answer."""
    last = next((item for item in reversed(_media_first(turn.content)) if isinstance(item, str)), "")
    return "" if last[-1:].isspace() else PLAIN.lead


def _text(content: Written) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _answer(message: AssistantMessage) -> str:
    texts = [_text(message.content), *(call.function.arguments for call in message.tool_calls)]
    return LINE_END.join(filter(None, texts))


def _content(message: UserMessage, param: str) -> list[str | PositionedMedia]:
    if isinstance(message.content, str):
        return [message.content]
    content: list[str | PositionedMedia] = []
    for index, part in enumerate(message.content):
        match part:
            case InputImagePart():
                content.append(PositionedMedia(f"{param}[{index}].image_url", part.image_url))
            case TextPart() | InputTextPart():
                content.append(part.text)
            case _:
                content.append(PositionedMedia(f"{param}[{index}]", part))
    return content


def _out_of_order(index: int, message: str) -> InvalidRequest:
    return InvalidRequest(message, param=f"messages[{index}].role")
