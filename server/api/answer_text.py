"""The text of one answer while it is made: tokens in, pieces to show out, up to its finish reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from model.tokenizer import PromptTokenizer
from server.api.detokenizer import Detokenizer, StopStrings
from server.api.generation import GenerationRequest
from server.wire import Finished, FinishReason, Token, TokenLogprob


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token, the offset of its text in the answer, and its log-probability if one was requested."""

    token_id: int
    offset: int
    logprob: TokenLogprob | None
    is_prompt: bool = False


@dataclass(slots=True)
class Piece:
    """The next part of an answer to show. Its text may lag behind its tokens: half characters, and text that may become a
    stop string, are held back."""

    text: str
    tokens: list[ShownToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    index: int = 0

    def add(self, later: Piece) -> None:
        self.text += later.text
        self.tokens += later.tokens
        self.finish_reason = later.finish_reason


class AnswerText:
    def __init__(self, generation: GenerationRequest, index: int, tokenizer: PromptTokenizer) -> None:
        self.is_begun = False
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._index = index
        self._prompt_ids = generation.prompt.encoded.token_ids
        self._min_tokens = generation.sampling.min_tokens
        self._text = Detokenizer(tokenizer, () if generation.echo else self._prompt_ids)
        self._stop = StopStrings(generation.stop, include=generation.include_stop)
        self._lead = "" if generation.echo else generation.lead
        self._length = 0

    def echo(self, scores: Sequence[TokenLogprob | None]) -> Piece:
        """Return the prompt as the first piece. Stop strings do not apply to it."""
        self.is_begun = True
        piece = Piece("", index=self._index)
        ids = self._prompt_ids
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
                piece.text = self._filter(self._text.push(event.token_id))
        if event.finish_reason is not None:
            piece.text += self._filter(self._text.finish()) + self._stop.finish()
        if self._stop.is_stopped:
            piece.finish_reason = "stop"
        self.finish_reason = piece.finish_reason
        return piece

    def _filter(self, text: str) -> str:
        text = self._counted(self._without_lead(text))
        return self._stop.push(text) if self.num_tokens > self._min_tokens else text

    def _without_lead(self, text: str) -> str:
        """Remove the lead, which may come in pieces, or not at all."""
        if not self._lead:
            return text
        shorter = min(len(text), len(self._lead))
        common = next((i for i in range(shorter) if text[i] != self._lead[i]), shorter)
        self._lead = self._lead[common:] if common == len(text) else ""
        return text[common:]

    def _counted(self, text: str) -> str:
        self._length += len(text)
        return text
