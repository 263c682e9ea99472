"""Makes the shots of some sequences attend alone, so that the model learns both forms of a few-shot prompt.

Of the images of such a sequence, the first half or more are shots, which attend to the text before the first image and to
themselves. All later ones are queries: each attends to that text, to all shots and to itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

from training.examples import Tokens
from training.mixture import PreparedExample, Stream


class FormStream:
    """The examples of a stream; with probability `p_alone`, the shots of an example attend alone."""

    def __init__(self, stream: Stream, p_alone: float, name: str) -> None:
        self._stream, self._p_alone, self._name = stream, p_alone, name
        self._num_taken = 0

    def take(self) -> PreparedExample:
        rng = Random(f"{self._name}/{self._num_taken}")
        self._num_taken += 1
        example = self._stream.take()
        if rng.random() >= self._p_alone:
            return example
        return replace(example, tokens=attend_alone(example.tokens, rng))

    def state(self) -> Any:
        return {"stream": self._stream.state(), "taken": self._num_taken}

    def load_state(self, state: Any) -> None:
        self._stream.load_state(state["stream"])
        self._num_taken = int(state["taken"])


def attend_alone(tokens: Tokens, rng: Random) -> Tokens:
    """Return the sequence with shots that attend alone, or the sequence itself where that is not possible.

    The targets are those of the queries, without names that occur in no shot. A sequence with a single image, or with text
    that reads the next image, is not changed; nor is one that would lose all its targets, such as different real names.
    """
    num_media = len(tokens.media)
    if num_media < 2 or tokens.reads_next:
        return tokens
    num_shots = rng.randrange((num_media + 1) // 2, num_media)
    spans = tuple(_span(media, num_shots) for media in tokens.media_index)
    answers = {first: _answer(tokens, first) for first in tokens.names}
    taught = {answer for first, answer in answers.items() if spans[first] > 0}
    unknown = {spans[first] for first, answer in answers.items() if spans[first] < 0 and answer not in taught}
    target = [flag and span < 0 and span not in unknown for flag, span in zip(tokens.target, spans, strict=True)]
    return replace(tokens, spans=spans, target=target) if any(target) else tokens


def _span(media: int, num_shots: int) -> int:
    """Return the span of a token by the image that it reads, -1 for none."""
    return media + 1 if media < num_shots else num_shots - media - 1


def _answer(tokens: Tokens, first: int) -> Sequence[int]:
    """Return the tokens from a name's first one to the end of its image's text."""
    media = tokens.media_index[first]
    end = next((i for i in range(first, len(tokens.media_index)) if tokens.media_index[i] != media), None)
    return tuple(tokens.token_ids[first:end])
