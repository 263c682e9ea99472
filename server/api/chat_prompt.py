"""A conversation becomes a few-shot prompt: each question with its answer is a shot, the last question the query.

A Flamingo was never taught to chat, so there is no chat template to apply. With the template "plain" this

    system     Name the animal.
    user       [image 1] What is this?
    assistant  a cat
    user       What is this? [image 2]

is written (for a family with an end-of-chunk token; without one, a line's end stands in its place) as

    Name the animal.
    <image 1>What is this? a cat<|endofchunk|><image 2>What is this?

and the model goes on with " a dog", whose space is the template's. Text and media keep their order, but for media behind
all text of a turn: they go before its last text, since text reads the media before it. The templates of few-shot
requests (`caption`, `vqa`) write the same turns their own way: what the user says is the question.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from model.config import FlamingoConfig
from model.prompt import EndOfChunk, Media, PromptError, Segment, Text, encode
from server.errors import InvalidRequest
from server.fewshot.templates import LINE_END, Query, Shot, Template, TemplateError, built_in, with_end
from server.media.intake import Intake
from server.read_prompt import PreparedPrompt
from server.schemas.chat import AssistantMessage, InputImagePart, Message, SystemMessage, UserMessage, UserPart
from server.schemas.media import ImageUrlPart, MediaPart, MediaUrl
from server.served_model import ServedModel

PLAIN = Template(name="plain", shot="{media}{question} {answer}")
# for a question that ends in a space of its own
PLAIN_UNSPACED = Template(name="plain", shot="{media}{question}{answer}")


@dataclass(frozen=True, slots=True)
class PositionedMedia:
    """A media part and where it stands in the request, such as `messages[0].content[1]`."""

    param: str
    part: MediaPart


@dataclass(slots=True)
class Turn:
    """What a user said and showed, and what was answered; the query has no answer."""

    said: list[str | PositionedMedia] = field(default_factory=list)
    answer: str = ""

    def say(self, said: Sequence[str | PositionedMedia]) -> None:
        """Texts side by side become one."""
        for one in said:
            if isinstance(one, str) and self.said and isinstance(self.said[-1], str):
                self.said[-1] += one
            elif one:
                self.said.append(one)

    @property
    def text(self) -> str:
        return "\n".join(said for said in self.said if isinstance(said, str))

    @property
    def shown(self) -> list[PositionedMedia]:
        return [said for said in self.said if isinstance(said, PositionedMedia)]


@dataclass(frozen=True, slots=True)
class Conversation:
    system: str
    shots: list[Turn]
    query: Turn


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """`template`: what an answer ends with, and what the model writes before it that is not the answer's."""

    prompt: PreparedPrompt
    template: Template


async def read_chat(messages: Sequence[Message], template: str, model: ServedModel, intake: Intake) -> ChatPrompt:
    """Raises `InvalidRequest` or `MediaNotFound` that names what is at fault."""
    conversation = read_conversation(messages)
    shown = [shown for turn in [*conversation.shots, conversation.query] for shown in turn.shown]
    media = await intake.read_all({shown.param: shown.part for shown in shown}, "messages")
    digests = {param: found.digest for param, found in media.items()}
    written = find_template(template, conversation.query, model.config)
    segments = lay_out(conversation, written, digests)
    try:
        encoded = encode(segments, model.tokenizer)
    except PromptError as error:
        raise InvalidRequest(str(error), param="messages") from None
    return ChatPrompt(PreparedPrompt(encoded, {found.digest: found for found in reversed(media.values())}), written)


def read_conversation(messages: Sequence[Message]) -> Conversation:
    """Messages of one role that follow each other are one. Raises `InvalidRequest` for an order that is no conversation."""
    system: list[str] = []
    turns: list[Turn] = []
    previous: Message | None = None
    for place, message in enumerate(messages):
        match message:
            case SystemMessage():
                if turns:
                    raise _out_of_order(place, "a system message stands before all others")
                system.append(_written(message))
            case UserMessage():
                is_next = isinstance(previous, UserMessage)
                if not is_next:
                    turns.append(Turn())
                turns[-1].say([LINE_END] * is_next + _said(message, f"messages[{place}].content"))
            case AssistantMessage():
                if not turns:
                    raise _out_of_order(place, "an assistant's message answers a user's, and there is none before it")
                turns[-1].answer += (LINE_END if isinstance(previous, AssistantMessage) else "") + _written(message)
        previous = message
    if not isinstance(previous, UserMessage):
        raise _out_of_order(len(messages) - 1, "the last message must be a user's: it is what is answered")
    return Conversation("\n".join(system), turns[:-1], turns[-1])


def find_template(name: str, query: Turn, config: FlamingoConfig) -> Template:
    """Raises `InvalidRequest` for a name that this model's family does not know."""
    known = built_in(config)
    if name == PLAIN.name:
        return with_end(PLAIN if _gap(query) else PLAIN_UNSPACED, config.prompt)
    if name not in known:
        raise InvalidRequest(f"there is no template {name!r}, only {', '.join([PLAIN.name, *known])}", param="template")
    return with_end(known[name], config.prompt)


def lay_out(conversation: Conversation, template: Template, digests: Mapping[str, bytes]) -> list[Segment]:
    """`digests`: each shown media's, by its place. Raises `InvalidRequest` for a turn that the template cannot write."""
    system: list[Segment] = [Text(conversation.system + LINE_END)] if conversation.system else []
    if template.name == PLAIN.name:
        end = Text(template.end) if template.end else EndOfChunk()
        rest = [segment for turn in conversation.shots for segment in _plain_shot(turn, digests, end)]
        rest += _plain_question(conversation.query, digests)
    else:
        rest = _render(template, conversation, digests)
    return joined_texts([*system, *rest])


def _render(template: Template, conversation: Conversation, digests: Mapping[str, bytes]) -> list[Segment]:
    shots = [Shot(media=_media(turn, digests), question=turn.text, text=turn.answer) for turn in conversation.shots]
    query = Query(media=_media(conversation.query, digests), question=conversation.query.text)
    try:
        return template.render(shots, query)
    except TemplateError as error:
        raise InvalidRequest(str(error), param="messages") from None


def _media(turn: Turn, digests: Mapping[str, bytes]) -> tuple[bytes, ...]:
    return tuple(digests[shown.param] for shown in turn.shown)


def _plain_shot(turn: Turn, digests: Mapping[str, bytes], end: Segment) -> Iterator[Segment]:
    yield from _plain_question(turn, digests)
    yield Text(("" if turn.answer[:1].isspace() else _gap(turn)) + turn.answer)
    yield end


def _plain_question(turn: Turn, digests: Mapping[str, bytes]) -> Iterator[Segment]:
    for said in _media_first(turn.said):
        yield Text(said) if isinstance(said, str) else Media(digests[said.param])


def _media_first(said: Sequence[str | PositionedMedia]) -> list[str | PositionedMedia]:
    last = max((place for place, one in enumerate(said) if isinstance(one, str)), default=-1)
    return [*said[: max(last, 0)], *said[last + 1 :], *said[max(last, 0) : last + 1]]


def _gap(turn: Turn) -> str:
    """Between a question and its answer."""
    last = next((said for said in reversed(_media_first(turn.said)) if isinstance(said, str)), "")
    return "" if last[-1:].isspace() else PLAIN.lead


def joined_texts(segments: Sequence[Segment]) -> list[Segment]:
    """Neighbouring texts as one: some families put a token between two."""
    joined: list[Segment] = []
    for segment in segments:
        if isinstance(segment, Text) and joined and isinstance(joined[-1], Text):
            joined[-1] = Text(joined[-1].text + segment.text)
        elif segment != Text(""):
            joined.append(segment)
    return joined


def _written(message: SystemMessage | AssistantMessage) -> str:
    return message.content if isinstance(message.content, str) else "".join(part.text for part in message.content)


def _said(message: UserMessage, param: str) -> list[str | PositionedMedia]:
    if isinstance(message.content, str):
        return [message.content]
    return [_one(part, f"{param}[{place}]") for place, part in enumerate(message.content)]


def _one(part: UserPart, param: str) -> str | PositionedMedia:
    if isinstance(part, MediaPart):
        return PositionedMedia(param, part)
    if isinstance(part, InputImagePart):
        return PositionedMedia(
            param, ImageUrlPart(type="image_url", image_url=MediaUrl(url=part.image_url, detail=part.detail))
        )
    return part.text


def _out_of_order(place: int, message: str) -> InvalidRequest:
    return InvalidRequest(message, param=f"messages[{place}].role")
