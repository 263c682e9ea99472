"""A training example, from segments to tokens and targets: `prompt.encode` as in serving, then the rules of the loss.

a document    sentence <|endofchunk|><image> sentence ... <|endofchunk|> end of text
a target      any token behind its first image that is no media token and does not lie between a chunk's end and the
              next image; an example may instead name the text segments that are its answers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from model.prompt import Media, Segment, Text, encode
from model.tokenizer import PromptTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """`answers`: the places in `segments` that are learned; None: whatever the rules allow. `names`: the places of the
    segments that say what the image before them is, learned or not. `name` is for complaints."""

    name: str
    segments: tuple[Segment, ...]
    answers: frozenset[int] | None = None
    names: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Tokens of one example; target[t] says whether token t is to be predicted, from those before it. `names`: the
    places of the tokens with which an image's name begins."""

    token_ids: list[int]
    media_index: list[int]
    target: list[bool]
    media: list[bytes]
    names: tuple[int, ...] = ()

    @property
    def num_targets(self) -> int:
        return sum(self.target)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_tokens: int
    max_media: int
    p_next: float = 0.0


def tokenize(example: Example, tokenizer: PromptTokenizer, limits: Limits, rng: Random) -> Tokens:
    """The example's tokens within the limits: a window at random where there are too many (paper, appendix A.1.2)."""
    if example.answers is not None:
        return _answered(example, tokenizer, limits)
    prompt = encode(example.segments, tokenizer)
    ids = [*prompt.token_ids, *_end_of_text(tokenizer)]
    first, end = _window(ids, tokenizer.media_token_id, limits, rng)
    ids, index = ids[first:end], _last_media(ids[first:end], tokenizer.media_token_id)
    before = sum(token == tokenizer.media_token_id for token in prompt.token_ids[:first])
    media = prompt.media[before : before + max(index, default=-1) + 1]
    if rng.random() < limits.p_next:
        index = _next_media(ids, tokenizer.media_token_id)
    return Tokens(token_ids=ids, media_index=index, target=_targets(ids, index, tokenizer), media=media)


def _answered(example: Example, tokenizer: PromptTokenizer, limits: Limits) -> Tokens:
    """Segment by segment, so that the answers' tokens are known; text must start where a token does."""
    assert example.answers is not None
    ids: list[int] = []
    target: list[bool] = []
    names = []
    for place, segment in enumerate(example.segments):
        piece = encode_segment(segment, tokenizer)
        names += [len(ids)] if place in example.names else []
        ids += piece
        target += [place in example.answers] * len(piece)
    media = [segment.digest for segment in example.segments if isinstance(segment, Media)]
    if len(ids) > limits.max_tokens or len(media) > limits.max_media:
        raise ValueError(
            f"{example.name}: {len(ids)} tokens and {len(media)} media, "
            f"the limits are {limits.max_tokens} and {limits.max_media}"
        )
    index = _last_media(ids, tokenizer.media_token_id)
    return Tokens(token_ids=ids, media_index=index, target=target, media=media, names=tuple(names))


def encode_segment(segment: Segment, tokenizer: PromptTokenizer) -> list[int]:
    if isinstance(segment, Text):
        return tokenizer.encode_plain(segment.text)
    return encode([segment], tokenizer).token_ids


def _end_of_text(tokenizer: PromptTokenizer) -> list[int]:
    """The family's last end token, unless it is the chunk's."""
    ends = [token for token in tokenizer.prompt.eos if token != tokenizer.prompt.end_of_chunk]
    return [tokenizer.id_of(ends[-1])] if ends else []


def _window(ids: Sequence[int], media_token: int, limits: Limits, rng: Random) -> tuple[int, int]:
    """Where the window starts and ends: it ends early in front of the first media that is too many."""
    first = rng.randrange(len(ids) - limits.max_tokens + 1) if len(ids) > limits.max_tokens else 0
    end = min(len(ids), first + limits.max_tokens)
    places = [place for place in range(first, end) if ids[place] == media_token]
    if len(places) > limits.max_media:
        end = places[limits.max_media]
    return first, end


def _last_media(ids: Sequence[int], media_token: int) -> list[int]:
    index, out = -1, []
    for token in ids:
        index += token == media_token
        out.append(index)
    return out


def _next_media(ids: Sequence[int], media_token: int) -> list[int]:
    """phi of the next image: a media token reads its own, text the one behind it, the last text none."""
    last = _last_media(ids, media_token)
    total = max(last, default=-1) + 1
    ahead = [index if token == media_token else index + 1 for token, index in zip(ids, last, strict=True)]
    return [index if index < total else -1 for index in ahead]


def _targets(ids: Sequence[int], media_index: Sequence[int], tokenizer: PromptTokenizer) -> list[bool]:
    chunk_end = tokenizer.id_of(tokenizer.prompt.end_of_chunk) if tokenizer.prompt.end_of_chunk else None
    between, out = False, []
    for place, token in enumerate(ids):
        is_media = token == tokenizer.media_token_id
        # the end of the text is the last chunk's own: it is learned like the chunk's end
        is_end = place == len(ids) - 1 and token in tokenizer.eos_ids
        between = between and not is_media
        out.append(place > 0 and media_index[place] >= 0 and not is_media and (not between or is_end))
        between = between or token == chunk_end
    return out
