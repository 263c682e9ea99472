"""Encodes prompts as token ids and a media index, with the tokenizer of a model folder. This module does not import torch.

Only `encode` knows how a family writes its markers; the trainer and the server both call it. `media_index[t]` (the paper's
phi) is the index of the last media item at or before token t, whose own media token already reads it; -1: none. There are
two copies of the tokenizer: `marked` knows the special tokens, and `plain` encodes their spelling as ordinary text, so that
the text of a user can never become a marker.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer

from model.config import ConfigError, PromptConfig


class PromptTokenizer:
    """The `tokenizer.json` of a model folder. Raises `ConfigError` if it cannot be read or lacks a prompt marker."""

    def __init__(self, marked: Tokenizer, plain: Tokenizer, prompt: PromptConfig) -> None:
        self.prompt = prompt
        self._marked = marked
        self._plain = plain
        plain.encode_special_tokens = True
        # no token has more bytes, so this gives a lower bound of a text's number of tokens
        self.max_token_bytes = max(len(token.encode()) for token in marked.get_vocab())
        self._special = tuple(t.content for t in marked.get_added_tokens_decoder().values() if t.special)
        self.media_token_id = self.id_of(prompt.media_token)
        self.eos_ids = tuple(self.id_of(token) for token in prompt.eos)
        self.suppressed_ids = tuple(self.id_of(token) for token in prompt.suppressed)
        for marker in (prompt.begin, prompt.media_open, prompt.media_close, prompt.end_of_chunk, prompt.text_separator):
            if marker:
                self.id_of(marker)

    @classmethod
    def load(cls, folder: Path, prompt: PromptConfig) -> PromptTokenizer:
        file = folder / "tokenizer.json"
        return cls(open_tokenizer(file), open_tokenizer(file), prompt)

    def id_of(self, token: str) -> int:
        token_id = self._marked.token_to_id(token)
        if token_id is None:
            raise ConfigError(f"prompt marker {token!r} is not a token of tokenizer.json")
        return int(token_id)

    def encode(self, written: Sequence[str]) -> list[int]:
        """Return the ids of alternating texts and markers, a text first; a special token's spelling in a text is text."""
        if not any(token in text for text in written[::2] for token in self._special):
            # one string, as in the family's own processors, so that text next to a marker is encoded in the same way
            return _ids(self._marked, "".join(written))
        parts = [[self.id_of(part)] if i % 2 else self.encode_plain(part) for i, part in enumerate(written) if part]
        return [token_id for part in parts for token_id in part]

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of a string, in which the spelling of a special token is ordinary text."""
        return _ids(self._plain, text)

    def encode_alone(self, text: str) -> list[int]:
        """Return the ids of a string without markers; a string that is exactly one special token gives its id."""
        return [self.id_of(text)] if text in self._special else self.encode_plain(text)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._marked.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str:
        """Return the vocabulary's spelling of an id, "" for an id beyond it (of a padded embedding table)."""
        return self._marked.id_to_token(token_id) or ""

    def to_json(self) -> str:
        """Return the tokenizer as JSON, for libraries that build their own table of its tokens."""
        return self._marked.to_str()

    def __len__(self) -> int:
        return int(self._marked.get_vocab_size(with_added_tokens=True))


def open_tokenizer(file: Path) -> Tokenizer:
    """Open a `tokenizer.json`. Raises `ConfigError` if it cannot be read or has no tokens.

    The truncation and padding that it may have are those of some earlier call, which transformers does not apply either.
    """
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower type
        raise ConfigError(f"{file} cannot be read as a tokenizer: {error}") from None
    if not tokenizer.get_vocab_size():
        raise ConfigError(f"{file} has no tokens")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    # only the library's calls for a batch let other threads run; they are faster without offsets
    return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids


class PromptError(ValueError):
    """A prompt that this model does not accept; the message is for the user."""


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


# the tokens to which a shot of a prompt attends besides its own: all text before it, or only the prefix
ShotsAttend = Literal["previous", "alone"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """Token ids, and the index of each token's media item in `media`, which holds digests; -1: the token reads none.

    A prompt whose shots attend alone consists of *spans* (see `span_starts`). A shot attends to the prefix and to itself,
    and its positions follow the prefix, wherever it is. The query attends to everything. The model's `alone_positions`
    determines the positions at which the query sees the shots: their own, where the query follows the longest shot, or
    positions in a row, where the query follows the last one. Prompts with different salts share nothing in a cache.
    """

    token_ids: list[int]
    media_index: list[int]
    media: list[bytes]
    shots_attend: ShotsAttend = "previous"
    salt: bytes = b""

    def followed_by(self, token_ids: list[int]) -> EncodedPrompt:
        """Return the prompt with more text tokens, which read its last media."""
        index = [self.media_index[-1]] * len(token_ids)
        return replace(self, token_ids=self.token_ids + token_ids, media_index=self.media_index + index)

    def up_to(self, num_tokens: int) -> EncodedPrompt:
        """Return the first tokens of the prompt, with all of its media."""
        return replace(self, token_ids=self.token_ids[:num_tokens], media_index=self.media_index[:num_tokens])

    @property
    def span_starts(self) -> list[int]:
        """The first tokens of the spans: the prefix before all media, and from each media item to the next one.

        The last span is the query. The prefix may be empty.
        """
        return [0, *(bisect_left(self.media_index, media) for media in range(len(self.media)))]

    def num_blocks(self, block_size: int, num_new_tokens: int = 0) -> int:
        """Return the number of blocks for the prompt and its answer in the text cache; each span begins a new block."""
        starts = self.span_starts if self.has_spans else [0]
        lengths = [stop - start for start, stop in pairwise([*starts, len(self.token_ids) + num_new_tokens])]
        return sum(-(-length // block_size) for length in lengths)

    @property
    def has_spans(self) -> bool:
        """True if there are shots that attend alone; with a single media item, both kinds of attention are the same."""
        return self.shots_attend == "alone" and len(self.media) > 1


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
    """Return alternating texts and markers, a text first and last; texts without a marker between them are joined."""
    prompt = tokenizer.prompt
    written = ["", prompt.begin, ""] if prompt.begin else [""]
    previous: Segment | None = None
    for segment in segments:
        match segment:
            case Text():
                markers = [prompt.text_separator if isinstance(previous, Text) else ""]
            case Media():
                # consecutive media items share the marker between them (IDEFICS)
                opening = "" if isinstance(previous, Media) else prompt.media_open
                markers = [opening, prompt.media_token, prompt.media_close]
            case EndOfChunk():
                if not prompt.end_of_chunk:
                    raise PromptError("this model has no end-of-chunk token: remove end_of_chunk")
                markers = [prompt.end_of_chunk]
        for marker in filter(None, markers):
            written += [marker, ""]
        if isinstance(segment, Text):
            written[-1] += segment.text.strip(" ") if prompt.strip_text else segment.text
        previous = segment
    return written
