"""Prompts: segments (text, media, end of chunk) become token ids and, per token, the index of the media that it reads.

Only `encode` knows how a family writes its markers; the trainer and the server both call it.
`media_index[t]` (the paper's phi) is the last media at or before token t: its own media token already reads it; -1 none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from model.tokenizer import PromptTokenizer


class PromptError(ValueError):
    """A prompt that this model cannot take; the message is for the user."""


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Media:
    digest: bytes


@dataclass(frozen=True, slots=True)
class EndOfChunk:
    pass


Segment = Text | Media | EndOfChunk


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """Token ids, and the media index of each into `media`, which holds digests; -1 means that a token reads none."""

    token_ids: list[int]
    media_index: list[int]
    media: list[bytes]

    def followed_by(self, token_ids: list[int]) -> EncodedPrompt:
        """Return the prompt with more text tokens, which read its last media."""
        index = [self.media_index[-1]] * len(token_ids)
        return replace(self, token_ids=self.token_ids + token_ids, media_index=self.media_index + index)


def encode(segments: Sequence[Segment], tokenizer: PromptTokenizer) -> EncodedPrompt:
    """Encode a prompt as the family writes it.

    Raises `PromptError` for an empty prompt, a segment for which the family has no marker, or a wrong number of markers.
    """
    token_ids = tokenizer.encode(_write(segments, tokenizer))
    return index_media(token_ids, [segment.digest for segment in segments if isinstance(segment, Media)], tokenizer)


def index_media(token_ids: list[int], media: list[bytes], tokenizer: PromptTokenizer) -> EncodedPrompt:
    """Give each token its media index; the number of media tokens must equal the number of media."""
    if not token_ids:
        raise PromptError("the prompt is empty")
    index, media_index = -1, []
    for token_id in token_ids:
        index += token_id == tokenizer.media_token_id
        media_index.append(index)
    if index + 1 != len(media):
        raise PromptError(f"the prompt has {index + 1} media tokens and {len(media)} media")
    return EncodedPrompt(token_ids=token_ids, media_index=media_index, media=media)


def _write(segments: Sequence[Segment], tokenizer: PromptTokenizer) -> list[str]:
    """Return texts and the family's markers in turn, a text first and last; two texts without a marker between are one."""
    prompt = tokenizer.prompt
    written = ["", prompt.begin, ""] if prompt.begin else [""]
    previous: Segment | None = None
    for segment in segments:
        match segment:
            case Text():
                markers = [prompt.text_separator if isinstance(previous, Text) else ""]
            case Media():
                # consecutive media share the marker between them (IDEFICS)
                opening = "" if isinstance(previous, Media) else prompt.media_open
                markers = [opening, prompt.media_token, prompt.media_close]
            case EndOfChunk():
                if not prompt.end_of_chunk:
                    raise PromptError("this model has no end-of-chunk token: leave end_of_chunk out")
                markers = [prompt.end_of_chunk]
        for marker in filter(None, markers):
            written += [marker, ""]
        if isinstance(segment, Text):
            written[-1] += segment.text.strip(" ") if prompt.strip_text else segment.text
        previous = segment
    return written
