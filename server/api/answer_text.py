"""One answer's text while it is made: tokens in, pieces to show out, up to its finish reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from model.tokenizer import PromptTokenizer
from server.api.detokenizer import Detokenizer, StopStrings
from server.media.source import EncodedMedia
from server.wire import Finished, FinishReason, Generate, Token, TokenLogprob


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token, where its text begins in the answer, and its log-probability if one was asked for."""

    token_id: int
    offset: int
    logprob: TokenLogprob | None
    is_prompt: bool = False


@dataclass(slots=True)
class Piece:
    """What there is to show next of an answer. Text may lag behind tokens: half characters and what may become a stop
    string are held back."""

    text: str
    tokens: list[ShownToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    index: int = 0

    def add(self, later: Piece) -> None:
        self.text += later.text
        self.tokens += later.tokens
        self.finish_reason = later.finish_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a route asks for. `echo` puts the prompt's text in front of each answer's.

    `lead` is taken off an answer's beginning: what the prompt's template puts there, and the model writes, is no answer.
    `details` stand in `usage.fewshot_details` beside the counts of media.
    """

    request: Generate
    media: Mapping[bytes, EncodedMedia]
    stop: Sequence[str] = ()
    include_stop: bool = False
    echo: bool = False
    lead: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


class AnswerText:
    def __init__(self, order: Order, index: int, tokenizer: PromptTokenizer) -> None:
        self.is_begun = False
        self.num_tokens = 0
        self.last_token: float | None = None
        self.finish_reason: FinishReason | None = None
        self._index = index
        self._request = order.request
        self._text = Detokenizer(tokenizer, () if order.echo else order.request.prompt.token_ids)
        self._stop = StopStrings(order.stop, include=order.include_stop)
        self._lead = "" if order.echo else order.lead
        self._length = 0

    def echo(self, scores: Sequence[TokenLogprob | None]) -> Piece:
        """The prompt as the first piece. Stop strings do not apply to it."""
        self.is_begun = True
        piece = Piece("", index=self._index)
        ids = self._request.prompt.token_ids
        for token_id, score in zip(ids, scores or [None] * len(ids), strict=True):
            piece.tokens.append(ShownToken(token_id, self._length, score, is_prompt=True))
            piece.text += self._counted(self._text.push(token_id))
        return piece

    def take(self, event: Token | Finished) -> Piece:
        self.is_begun = True
        piece = Piece("", finish_reason=event.finish_reason, index=self._index)
        if isinstance(event, Token):
            self.num_tokens += 1
            piece.tokens.append(ShownToken(event.token_id, self._length, event.logprob))
            if event.finish_reason != "stop":  # else it is an end-of-sequence or stop token, which has no text
                piece.text = self._let_through(self._text.push(event.token_id))
        if event.finish_reason is not None:
            piece.text += self._let_through(self._text.finish()) + self._stop.finish()
        if self._stop.is_stopped:
            piece.finish_reason = "stop"
        self.finish_reason = piece.finish_reason
        return piece

    def _let_through(self, text: str) -> str:
        text = self._counted(self._without_lead(text))
        return self._stop.push(text) if self.num_tokens > self._request.sampling.min_tokens else text

    def _without_lead(self, text: str) -> str:
        """The lead may come in pieces, and an answer may do without it."""
        if not self._lead:
            return text
        shorter = min(len(text), len(self._lead))
        common = next((place for place in range(shorter) if text[place] != self._lead[place]), shorter)
        self._lead = self._lead[common:] if common == len(text) else ""
        return text[common:]

    def _counted(self, text: str) -> str:
        self._length += len(text)
        return text
