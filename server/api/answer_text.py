"""Turns the tokens of one answer into pieces of text while it is generated, with their log-probabilities.

Text is shown only when it is certain: never half a character, never the beginning of a stop string. A single token has no
definite text: the bytes of a character may be in several tokens, and a leading space depends on the tokens before. So a
small window of ids is decoded twice, without and with the new token, and the difference is its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from model.prompt import PromptTokenizer
from server.api.generation import GenerationRequest
from server.wire import Finished, FinishReason, Token, TokenLogprob

# number of prompt ids before the first token: enough for a decoder that strips or joins text between them
CONTEXT = 4
# a character has at most four bytes; twice as many ids without a whole character never become one
MAX_HELD = 8
# maximum number of ids that can begin a character without ending it
MAX_UNFINISHED = 3
REPLACEMENT = "\ufffd"


class Detokenizer:
    """Decodes one token at a time; `context` holds the ids before the first one, whose text is not returned.

    `start` is the number of characters at the beginning of the text returned last that belong to earlier tokens, whose
    bytes were no whole character.
    """

    def __init__(self, tokenizer: PromptTokenizer, context: Sequence[int] = ()) -> None:
        self.start = 0
        self._tokenizer = tokenizer
        self._window = _whole_characters(tokenizer, context)
        self._num_emitted = len(self._window)
        self._held = ""  # the text of ids whose text is not returned yet, as the decoder shows it

    def copy(self) -> Detokenizer:
        other = Detokenizer(self._tokenizer)
        other._window, other._num_emitted, other._held = list(self._window), self._num_emitted, self._held
        return other

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; "" while a character is incomplete."""
        self._window.append(token_id)
        text, held = self._unemitted(), self._held
        self.start, self._held = 0, text
        if (text.endswith(REPLACEMENT) or not text) and len(self._window) - self._num_emitted < MAX_HELD:
            return ""
        certain = len(self._window) - self._num_unfinished(text)
        unfinished = self._window[certain:]
        self._window = self._window[:certain]
        self._advance()
        self._window += unfinished
        self._held = REPLACEMENT if unfinished else ""
        certain_text = text[: -len(REPLACEMENT)] if unfinished else text
        self.start = _num_common(held, certain_text)
        return certain_text

    def finish(self) -> str:
        """Return the remaining text; an incomplete character is shown as the decoder shows it."""
        text = self._unemitted()
        self._advance()
        return text

    def _num_unfinished(self, text: str) -> int:
        """Return how many of the last ids may begin a character; ids before these are too many for one, and invalid."""
        if not text.endswith(REPLACEMENT):
            return 0
        shorter = self._tokenizer.decode(self._window)[: -len(REPLACEMENT)]
        counts = range(1, MAX_UNFINISHED + 1)
        return next((count for count in counts if self._tokenizer.decode(self._window[:-count]) == shorter), 0)

    def _unemitted(self) -> str:
        before = self._tokenizer.decode(self._window[: self._num_emitted])
        return self._tokenizer.decode(self._window)[len(before) :]

    def _advance(self) -> None:
        """Use the ids decoded last as the next context: they begin and end with a whole character."""
        self._window = self._window[self._num_emitted :]
        self._num_emitted = len(self._window)


def _num_common(first: str, second: str) -> int:
    """Return the number of characters with which both texts begin."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def _whole_characters(tokenizer: PromptTokenizer, ids: Sequence[int]) -> list[int]:
    """Return the last few ids that begin and end with a whole character, or none."""
    tails = (list(ids[-length:]) for length in range(CONTEXT, CONTEXT + 4))
    return next((tail for tail in tails if REPLACEMENT not in tokenizer.decode(tail)), [])


class StopStrings:
    """Passes text on up to the first stop string; an end that may be the beginning of one is held back.

    Each character is compared a bounded number of times on average, however a stop string repeats itself (Knuth, Morris and
    Pratt, 1977).
    """

    def __init__(self, stop: Sequence[str], *, include: bool) -> None:
        self._stop = [(string, borders(string)) for string in stop]
        self._matched = [0] * len(stop)  # by stop string, the length of its beginning that ends the text
        self._include = include
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        if not self._stop or self.is_stopped:
            return "" if self.is_stopped else text
        start, self._held = len(self._held), self._held + text
        for end, character in enumerate(text, start + 1):
            # the stop string that is complete first ends the text, even if another one began earlier
            if length := self._completed(character):
                self.is_stopped = True
                return self._held[: end if self._include else end - length]
        certain = self._held[: len(self._held) - max(self._matched)]
        self._held = self._held[len(certain) :]
        return certain

    def finish(self) -> str:
        """Return the text that was held back, which is not a stop string."""
        text, self._held = ("" if self.is_stopped else self._held), ""
        return text

    def _completed(self, character: str) -> int:
        """Match one more character, and return the length of the longest stop string that it completes, or 0."""
        completed = 0
        for index, (string, shorter) in enumerate(self._stop):
            matched = self._matched[index]
            while matched and string[matched] != character:
                matched = shorter[matched]
            matched += string[matched] == character
            self._matched[index] = matched
            if matched == len(string):
                completed = max(completed, matched)
        return completed


@lru_cache(maxsize=1 << 10)
def borders(string: str) -> list[int]:
    """Return, for each length of a beginning of the string, the length of the longest shorter one that also ends it."""
    lengths = [0, 0]
    for index in range(1, len(string)):
        length = lengths[index]
        while length and string[length] != string[index]:
            length = lengths[length]
        lengths.append(length + (string[length] == string[index]))
    return lengths


@lru_cache(maxsize=1 << 16)
def token_text(tokenizer: PromptTokenizer, token_id: int) -> str:
    """Return a token as responses show it: its text if it has one by itself, otherwise its spelling in the vocabulary."""
    spelling = tokenizer.token(token_id)
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    if REPLACEMENT in text or not text:
        return spelling
    return f" {text}" if spelling.startswith("▁") and not text.startswith(" ") else text


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token, the offset of its text in the answer, and its log-probability if one was requested."""

    token_id: int
    offset: int
    logprob: TokenLogprob | None
    is_prompt: bool = False


@dataclass(slots=True)
class AnswerPiece:
    """The next part of an answer to show.

    Its text may come later than its tokens: half characters, and text that may become a stop string, are held back.
    """

    text: str
    tokens: list[ShownToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    index: int = 0

    def add(self, later: AnswerPiece) -> None:
        self.text += later.text
        self.tokens += later.tokens
        self.finish_reason = later.finish_reason


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as every answer to it repeats it: computed once. `detokenizer` decodes the token that comes next."""

    text: str
    tokens: list[ShownToken]
    detokenizer: Detokenizer

    @classmethod
    def of(cls, ids: Sequence[int], scores: Sequence[TokenLogprob | None], tokenizer: PromptTokenizer) -> Echo:
        """Return the echo of a prompt; `scores` is empty if no log-probabilities were requested."""
        detokenizer, texts, length = Detokenizer(tokenizer), list[str](), 0
        tokens = []
        for token_id, score in zip(ids, scores or [None] * len(ids), strict=True):
            texts.append(detokenizer.push(token_id))
            tokens.append(ShownToken(token_id, length + detokenizer.start, score, is_prompt=True))
            length += len(texts[-1])
        return cls("".join(texts), tokens, detokenizer)


class AnswerText:
    """Turns the events of one answer into pieces. An answer with an echo begins with the prompt."""

    def __init__(
        self, generation: GenerationRequest, index: int, tokenizer: PromptTokenizer, echo: Echo | None
    ) -> None:
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._index = index
        self._echo = echo
        self._min_tokens = generation.sampling.min_tokens
        self._text = echo.detokenizer.copy() if echo else Detokenizer(tokenizer, generation.prompt.encoded.token_ids)
        self._stop = StopStrings(generation.stop, include=generation.include_stop)
        self._lead = "" if echo else generation.lead
        self._length = len(echo.text) if echo else 0

    def first_piece(self) -> AnswerPiece | None:
        """Return the prompt, if the answer repeats it. Stop strings do not apply to it."""
        return AnswerPiece(self._echo.text, list(self._echo.tokens), index=self._index) if self._echo else None

    def take(self, event: Token | Finished) -> AnswerPiece:
        piece = AnswerPiece("", finish_reason=event.finish_reason, index=self._index)
        if isinstance(event, Token):
            self.num_tokens += 1
            piece.text, offset = self._take_text(event)
            piece.tokens.append(ShownToken(event.token_id, offset, event.logprob))
        if event.finish_reason is not None:
            piece.text += self._filter(self._text.finish()) + self._stop.finish()
        if self._stop.is_stopped:
            piece.finish_reason = "stop"
        self.finish_reason = piece.finish_reason
        return piece

    def _take_text(self, token: Token) -> tuple[str, int]:
        """Return the text that a token completes, and the offset of its own; an end-of-sequence or stop token has none."""
        if token.finish_reason == "stop":
            return self._filter(self._text.finish()), self._length
        before, text = self._length, self._text.push(token.token_id)
        completed = self._filter(text)
        return completed, max(before, self._length - len(text) + self._text.start)

    def _filter(self, text: str) -> str:
        text = self._without_lead(text)
        self._length += len(text)
        return self._stop.push(text) if self.num_tokens > self._min_tokens else text

    def _without_lead(self, text: str) -> str:
        """Remove the lead, which may arrive in pieces, or not at all."""
        if not self._lead:
            return text
        common = _num_common(text, self._lead)
        self._lead = self._lead[common:] if common == len(text) else ""
        return text[common:]


# JSON has no minus infinity
LOWEST = -9999.0


def completion_logprobs(tokens: Sequence[ShownToken], tokenizer: PromptTokenizer) -> dict[str, list[Any]]:
    """Return the four lists of a completion; the log-probability of a prompt's first token is null."""
    scores = [token.logprob for token in tokens]
    return {
        "tokens": [token_text(tokenizer, token.token_id) for token in tokens],
        "token_logprobs": [None if score is None else max(score.logprob, LOWEST) for score in scores],
        "top_logprobs": [None if score is None else _top(score, tokenizer) for score in scores],
        "text_offset": [token.offset for token in tokens],
    }


def _top(score: TokenLogprob, tokenizer: PromptTokenizer) -> dict[str, float]:
    """Return the most likely tokens and the sampled one; of tokens with the same text, only the most likely one."""
    top: dict[str, float] = {}
    for token_id, logprob in [*score.top, (score.token_id, score.logprob)]:
        top.setdefault(token_text(tokenizer, token_id), max(logprob, LOWEST))
    return top


def chat_logprobs(tokens: Sequence[ShownToken], tokenizer: PromptTokenizer, num_top: int) -> dict[str, Any]:
    """Return one entry per token, with its `num_top` most likely alternatives."""
    content = [
        {
            **_chat_token(score.token_id, score.logprob, tokenizer),
            "top_logprobs": [_chat_token(token_id, logprob, tokenizer) for token_id, logprob in score.top[:num_top]],
        }
        for score in (token.logprob for token in tokens)
        if score is not None
    ]
    return {"content": content, "refusal": None}


def _chat_token(token_id: int, logprob: float, tokenizer: PromptTokenizer) -> dict[str, Any]:
    """Return a token's entry; `bytes` is null for a token that is not text by itself, such as half a character."""
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    is_text = bool(text) and REPLACEMENT not in text
    token = token_text(tokenizer, token_id)
    return {"token": token, "logprob": max(logprob, LOWEST), "bytes": list(token.encode()) if is_text else None}


def prompt_logprobs(
    scores: Sequence[TokenLogprob | None], tokenizer: PromptTokenizer
) -> list[dict[str, dict[str, Any]] | None]:
    """Return vLLM's shape: for each prompt token null or {token id: {logprob, decoded_token}}."""
    return [None if score is None else _by_id(score, tokenizer) for score in scores]


def _by_id(score: TokenLogprob, tokenizer: PromptTokenizer) -> dict[str, dict[str, Any]]:
    logprobs = {**dict(score.top), score.token_id: score.logprob}
    return {
        str(token_id): {"logprob": max(logprob, LOWEST), "decoded_token": token_text(tokenizer, token_id)}
        for token_id, logprob in logprobs.items()
    }
