"""Reads the texts and images of a decision in their order: its input, and the instructions of its questions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from model.prompt import Media, Segment, Text
from server.errors import InvalidRequest
from server.fewshot.templates import LINE_END
from server.media.source import EncodedMedia
from server.schemas.decisions import (
    DecisionAssistantMessage,
    DecisionContent,
    DecisionImagePart,
    DecisionInput,
    DecisionJsonPart,
    DecisionPart,
    OutputPart,
    OutputRefusalPart,
)
from server.schemas.prompt import MediaPartOrUrl

# the path of the input in a request
INPUT = "input"


@dataclass(frozen=True, slots=True)
class PositionedMedia:
    """A media part and its path in the request, such as `input[0].content[1].image_url`."""

    param: str
    part: MediaPartOrUrl


@dataclass(frozen=True, slots=True)
class Passage:
    """Texts and media in their order."""

    pieces: Sequence[str | PositionedMedia]

    @property
    def text(self) -> str:
        return "".join(piece for piece in self.pieces if isinstance(piece, str)).strip()

    def parts(self, param: str) -> dict[str, MediaPartOrUrl]:
        """Return the media parts by their paths in the request."""
        return {piece.param: piece.part for piece in self.pieces if isinstance(piece, PositionedMedia)}

    def segments(self, media: Sequence[EncodedMedia]) -> tuple[Segment, ...]:
        """Return the segments, with the given media in order; a final text gets a line break."""
        items = iter(media)
        segments = [Text(piece) if isinstance(piece, str) else Media(next(items).digest) for piece in self.pieces]
        is_text = isinstance(self.pieces[-1], str)
        return (*segments, Text(LINE_END)) if is_text else tuple(segments)


def read_input(value: DecisionInput) -> Passage:
    """Read the input of a decision, with a line per message. Raises `InvalidRequest` if it is empty.

    Messages of a conversation, in which an assistant takes part, begin with their role.
    """
    pieces: list[str | PositionedMedia] = []
    if isinstance(value, str):
        pieces.append(value)
    else:
        is_conversation = any(isinstance(message, DecisionAssistantMessage) for message in value)
        for index, message in enumerate(value):
            pieces += [LINE_END] * bool(index) + [f"{message.role.capitalize()}: "] * is_conversation
            pieces += _pieces(message.content, f"{INPUT}[{index}].content")
    passage = Passage(list(filter(None, pieces)))
    if not passage.text and not passage.parts(INPUT):
        raise InvalidRequest("the input has no text and no image", param=INPUT)
    return passage


def read_instructions(value: DecisionContent, param: str) -> Passage:
    """Read the instructions of a question. Raises `InvalidRequest` if they have no text."""
    instructions = Passage([*_pieces(value, param)])
    if not instructions.text:
        raise InvalidRequest("the instructions have no text", param=param)
    return instructions


def _pieces(content: str | Sequence[DecisionPart | OutputPart], param: str) -> Iterator[str | PositionedMedia]:
    if isinstance(content, str):
        yield content
        return
    for index, part in enumerate(content):
        match part:
            case DecisionImagePart():
                yield PositionedMedia(f"{param}[{index}].image_url", part.image_url)
            case DecisionJsonPart():
                yield json.dumps(part.data, ensure_ascii=False)
            case OutputRefusalPart():
                yield part.refusal
            case _:
                yield part.text
