"""Prompts: segments (text, media, end of chunk) become token ids and, per token, the index of the media that it reads.

Only `encode` knows how a family writes its markers; the trainer and the server both call it.
`media_index[t]` (the paper's phi) is the last media at or before token t: its own media token already reads it; -1 none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

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


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of the written prompt: a marker of the family, or text of the user."""

    text: str
    is_marker: bool


def encode(segments: Sequence[Segment], tokenizer: PromptTokenizer) -> EncodedPrompt:
    """Encode a prompt as the family writes it.

    Raises `PromptError` for an empty prompt, a segment for which the family has no marker, or a wrong number of markers.
    """
    pieces = _joined(_write(segments, tokenizer))
    media = [segment.digest for segment in segments if isinstance(segment, Media)]
    return index_media(_token_ids(pieces, tokenizer), media, tokenizer)


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


def _write(segments: Sequence[Segment], tokenizer: PromptTokenizer) -> Iterator[_Piece]:
    prompt = tokenizer.prompt
    previous: Segment | None = None
    if prompt.begin:
        yield _Piece(prompt.begin, True)
    for segment in segments:
        match segment:
            case Text(text):
                if isinstance(previous, Text) and prompt.text_separator:
                    yield _Piece(prompt.text_separator, True)
                yield _Piece(text.strip(" ") if prompt.strip_text else text, False)
            case Media():
                # consecutive media share the marker between them (IDEFICS)
                if prompt.media_open and not isinstance(previous, Media):
                    yield _Piece(prompt.media_open, True)
                yield _Piece(prompt.media_token, True)
                if prompt.media_close:
                    yield _Piece(prompt.media_close, True)
            case EndOfChunk():
                if not prompt.end_of_chunk:
                    raise PromptError("this model has no end-of-chunk token: leave end_of_chunk out")
                yield _Piece(prompt.end_of_chunk, True)
        previous = segment


def _joined(pieces: Iterable[_Piece]) -> list[_Piece]:
    """Join consecutive texts: two of them may spell a marker together."""
    runs = groupby(pieces, key=lambda piece: piece.is_marker)
    return [
        piece
        for is_marker, run in runs
        for piece in (run if is_marker else [_Piece("".join(text.text for text in run), False)])
    ]


def _token_ids(pieces: list[_Piece], tokenizer: PromptTokenizer) -> list[int]:
    written = [piece.text for piece in pieces if not piece.is_marker]
    if not any(map(tokenizer.holds_marker, written)):
        # one string, as in the family's own processors, so that the tokenizer treats text next to a marker as theirs do
        return tokenizer.encode_marked("".join(piece.text for piece in pieces))
    return [token_id for piece in pieces for token_id in _piece_ids(piece, tokenizer)]


def _piece_ids(piece: _Piece, tokenizer: PromptTokenizer) -> list[int]:
    return [tokenizer.id_of(piece.text)] if piece.is_marker else tokenizer.encode_plain(piece.text)
