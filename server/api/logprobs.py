"""Log-probabilities in OpenAI's shapes: four parallel lists for a completion, a list of tokens for a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from model.tokenizer import PromptTokenizer
from server.api.answer_text import REPLACEMENT, ShownToken, token_text
from server.wire import TokenLogprob

# JSON has no minus infinity
LOWEST = -9999.0


def completion_logprobs(tokens: Sequence[ShownToken], tokenizer: PromptTokenizer) -> dict[str, list[Any]]:
    """Return the four lists of a completion; the first token of a prompt has no log-probability: null."""
    scores = [token.logprob for token in tokens]
    return {
        "tokens": [token_text(tokenizer, token.token_id) for token in tokens],
        "token_logprobs": [None if score is None else max(score.logprob, LOWEST) for score in scores],
        "top_logprobs": [None if score is None else _top(score, tokenizer) for score in scores],
        "text_offset": [token.offset for token in tokens],
    }


def _top(score: TokenLogprob, tokenizer: PromptTokenizer) -> dict[str, float]:
    """Return the most likely tokens and the sampled one; of two with one text, the likelier one."""
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
    """Return a token's entry; `bytes` is null for a token that is no text by itself, such as half a character."""
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
