"""Encodes training examples with `prompt.encode`, as in serving, and selects the target tokens by the loss's rules.

a document    sentence <|endofchunk|><image> sentence ... <|endofchunk|> end of text
a target      any token after the first image that a model may write (so no media token) and that does not lie between a
              chunk's end and the next image; an example may instead list the text segments that are its answers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from model.prompt import EndOfChunk, Media, PromptTokenizer, Segment, Text, encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A sequence of segments to learn from.

    `answers` are the indices of the segments that are targets; None applies the rules above. `names` are the indices of
    the segments that name the image before them, whether they are targets or not. `name` identifies the example in
    errors.
    """

    name: str
    segments: tuple[Segment, ...]
    answers: frozenset[int] | None = None
    names: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The tokens of one example.

    `target[t]` is true if token t is predicted from the tokens before it. `names` are the positions of the tokens at
    which an image's name begins. `spans` are those of `model.batch.Batch`, empty if shots attend to those before them.
    """

    token_ids: list[int]
    media_index: list[int]
    target: list[bool]
    media: list[bytes]
    names: tuple[int, ...] = ()
    spans: tuple[int, ...] = ()
    # text reads the next media item instead of the last one
    reads_next: bool = False

    @property
    def num_targets(self) -> int:
        return sum(self.target)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_tokens: int
    max_media: int
    p_next: float = 0.0


def tokenize(example: Example, tokenizer: PromptTokenizer, limits: Limits, rng: Random) -> Tokens:
    """Return the example's tokens within the limits.

    A document that is too long gives a random window with media (paper, appendix A.1.2). Raises ValueError if an example
    with answers exceeds the limits.
    """
    if example.answers is not None:
        return _tokenize_answers(example, tokenizer, limits)
    prompt = encode(_known(example.segments, tokenizer), tokenizer)
    ids = [*prompt.token_ids, *_end_of_text(tokenizer)]
    first, end = _window(ids, tokenizer.media_token_id, limits, rng)
    ids, index = ids[first:end], _last_media_index(ids[first:end], tokenizer.media_token_id)
    before = sum(token == tokenizer.media_token_id for token in prompt.token_ids[:first])
    media = prompt.media[before : before + max(index, default=-1) + 1]
    reads_next = rng.random() < limits.p_next
    if reads_next:
        index = _next_media_index(ids, tokenizer.media_token_id)
    target = _targets(ids, index, tokenizer)
    return Tokens(token_ids=ids, media_index=index, target=target, media=media, reads_next=reads_next)


def _tokenize_answers(example: Example, tokenizer: PromptTokenizer, limits: Limits) -> Tokens:
    """Encode segment by segment, so that the answers' tokens are known; each text segment starts a new token."""
    assert example.answers is not None
    ids: list[int] = []
    target: list[bool] = []
    names = []
    for i, segment in enumerate(example.segments):
        segment_ids = encode_segment(segment, tokenizer)
        names += [len(ids)] if i in example.names else []
        ids += segment_ids
        target += [i in example.answers] * len(segment_ids)
    media = [segment.digest for segment in example.segments if isinstance(segment, Media)]
    if len(ids) > limits.max_tokens or len(media) > limits.max_media:
        raise ValueError(
            f"example {example.name} has {len(ids)} tokens and {len(media)} media, "
            f"the limits are {limits.max_tokens} and {limits.max_media}"
        )
    index = _last_media_index(ids, tokenizer.media_token_id)
    return Tokens(token_ids=ids, media_index=index, target=target, media=media, names=tuple(names))


def encode_segment(segment: Segment, tokenizer: PromptTokenizer) -> list[int]:
    if isinstance(segment, Text):
        return tokenizer.encode_plain(segment.text)
    return encode([segment], tokenizer).token_ids


def _known(segments: Sequence[Segment], tokenizer: PromptTokenizer) -> Sequence[Segment]:
    """Leave out the ends of chunks if the model has no token for them; only the document's end is learned then."""
    if tokenizer.prompt.end_of_chunk:
        return segments
    return [segment for segment in segments if not isinstance(segment, EndOfChunk)]


def _end_of_text(tokenizer: PromptTokenizer) -> list[int]:
    """Return the family's last end token, unless it is the end of a chunk."""
    ends = [token for token in tokenizer.prompt.eos if token != tokenizer.prompt.end_of_chunk]
    return [tokenizer.id_of(ends[-1])] if ends else []


def _window(ids: Sequence[int], media_token: int, limits: Limits, rng: Random) -> tuple[int, int]:
    """Return the window's start and end; it ends early, before the first media item that exceeds the limit.

    Media over the limit are dropped as in the paper. All later text would read dropped media or none, so it has no targets.
    A window without media would have none either: a long caption keeps its image, and is cut.
    """
    media = [position for position, token in enumerate(ids) if token == media_token]
    starts = range(max(len(ids) - limits.max_tokens, 0) + 1)
    first = rng.choice(_starts_with_media(starts, media, limits.max_tokens) or starts) if len(starts) > 1 else 0
    end = min(len(ids), first + limits.max_tokens)
    within = [position for position in media if first <= position < end]
    if len(within) > limits.max_media:
        end = within[limits.max_media]
    return first, end


def _starts_with_media(starts: range, media: Sequence[int], length: int) -> list[int]:
    """Return the starts of windows that contain a media item and a token after it."""
    covered = {start for position in media for start in range(position - length + 2, position + 1)}
    return sorted(covered.intersection(starts))


def _last_media_index(ids: Sequence[int], media_token: int) -> list[int]:
    index, out = -1, []
    for token in ids:
        index += token == media_token
        out.append(index)
    return out


def _next_media_index(ids: Sequence[int], media_token: int) -> list[int]:
    """Return phi for the next image: a media token reads its own image, text the next one, and the last text none."""
    last = _last_media_index(ids, media_token)
    total = max(last, default=-1) + 1
    ahead = [index if token == media_token else index + 1 for token, index in zip(ids, last, strict=True)]
    return [index if index < total else -1 for index in ahead]


def _targets(ids: Sequence[int], media_index: Sequence[int], tokenizer: PromptTokenizer) -> list[bool]:
    chunk_end = tokenizer.id_of(tokenizer.prompt.end_of_chunk) if tokenizer.prompt.end_of_chunk else None
    # the media token, and what a family writes before and after it
    never = {tokenizer.media_token_id, *tokenizer.suppressed_ids}
    is_between, targets = False, []  # between a chunk's end and the next image
    for position, token in enumerate(ids):
        is_media = token == tokenizer.media_token_id
        # the end of the text belongs to the last chunk and is a target like the chunk's end
        is_end = position == len(ids) - 1 and token in tokenizer.eos_ids
        is_between = is_between and not is_media
        targets.append(
            position > 0 and media_index[position] >= 0 and token not in never and (not is_between or is_end)
        )
        is_between = is_between or token == chunk_end
    return targets
