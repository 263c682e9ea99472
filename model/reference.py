"""Generation without a cache: the reference against which every faster path is tested.

It decodes one sequence at a time, greedily, and computes the whole sequence again in each step. It is slow on purpose.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from model.batch import NO_CACHE, Batch, MediaPages, whole_sequences
from model.config import AlonePositions
from model.flamingo import Flamingo
from model.language_model import Layer


@dataclass(frozen=True, slots=True)
class Generation:
    token_ids: list[int]
    logprobs: list[float]


def encode(model: Flamingo, pixels: Sequence[Tensor]) -> MediaPages:
    """Return a page per media item; `pixels` holds one [F, 3, h, w] per item."""
    config = model.config
    if not pixels:
        return MediaPages.zeros(config, 0, next(model.parameters()).dtype, next(model.parameters()).device)
    return model.fresh_media(torch.cat([model.encode_media(p[None]) for p in pixels]))


@torch.inference_mode()
def log_probs(
    model: Flamingo,
    token_ids: Sequence[int],
    media_index: Sequence[int],
    media: MediaPages,
    span_starts: Sequence[int] = (),
) -> Tensor:
    """Return the log-probabilities [T, V + A], in float32, of the token that follows each token.

    `span_starts` is needed for a prompt whose shots attend alone.
    """
    device = next(model.parameters()).device
    batch = whole_sequences([token_ids], [model.media_slots(media_index)], device)
    logits = _forward_of_spans(model, batch, media, span_starts) if span_starts else model(batch, NO_CACHE, media)
    return logits.float().log_softmax(-1)


def _forward_of_spans(model: Flamingo, batch: Batch, media: MediaPages, span_starts: Sequence[int]) -> Tensor:
    """Run the model's forward with explicit positions and an explicit mask."""
    language_model = model.language_model
    layout = _layout(span_starts, len(batch.token_ids), language_model.config.alone_positions)
    batch = replace(batch, positions=layout.positions.to(batch.positions))
    x = language_model.embed_tokens(batch)
    context = language_model.step_context(batch, x.dtype)
    query_context = language_model.step_context(replace(batch, positions=layout.seen.to(batch.positions)), x.dtype)
    slopes = 0.0 if context.alibi_slopes is None else context.alibi_slopes[:, None, None]
    is_query = layout.is_query[:, None]
    bias = slopes * (torch.where(is_query, layout.seen, layout.positions) - layout.positions[:, None]).float()
    bias = bias.masked_fill(~layout.readable, -torch.inf)  # [T, T], or [H, T, T]
    for i, gated, layer in model.layers():
        assert isinstance(layer, Layer)
        if gated is not None:
            x = gated(x, media.layer(i), batch.media_slot)
        query, key, value = layer.attention.project(layer.attention_norm(x), context)
        _, seen_key, _ = layer.attention.project(layer.attention_norm(x), query_context)
        group = query.shape[1] // key.shape[1]
        key, seen_key, value = (part.repeat_interleave(group, 1) for part in (key, seen_key, value))
        products = [torch.einsum("qhk,chk->hqc", query, keys) for keys in (seen_key, key)]
        scores = torch.where(is_query, *products) * layer.attention.head_dim**-0.5 + bias
        attended = torch.einsum("hqc,chk->qhk", scores.softmax(-1), value)
        h = x + layer.attention.output(attended.flatten(-2))
        x = h + layer.feed_forward(layer.ffn_norm(x if layer.parallel else h))
    return language_model.logits(x)


class _Layout(NamedTuple):
    """The position of each token of a prompt whose shots attend alone, and which keys each reads."""

    positions: Tensor  # [T]
    seen: Tensor  # [T], the positions at which the query sees them
    is_query: Tensor  # [T]
    readable: Tensor  # [T, T]


def _layout(span_starts: Sequence[int], num_tokens: int, alone_positions: AlonePositions) -> _Layout:
    index = torch.arange(num_tokens)
    span = torch.bucketize(index, torch.tensor(span_starts[1:]), right=True)  # 0: the prefix
    last, prefix = len(span_starts) - 1, span_starts[1]
    longest = max(end - start for start, end in pairwise(span_starts[1:]))
    after = span_starts[-1] if alone_positions == "in_a_row" else prefix + longest
    origin = torch.tensor([0] + [prefix] * (last - 1) + [after])
    positions = origin[span] + index - torch.tensor(span_starts)[span]
    seen = index if alone_positions == "in_a_row" else positions
    may_read = (span == span[:, None]) | (span == 0) | (span[:, None] == last)
    return _Layout(positions, seen, span == last, may_read & (index <= index[:, None]))


@torch.inference_mode()
def generate(
    model: Flamingo,
    token_ids: Sequence[int],
    media_index: Sequence[int],
    pixels: Sequence[Tensor],
    *,
    max_tokens: int,
    eos_ids: Collection[int] = (),
    suppressed_ids: Sequence[int] = (),
    span_starts: Sequence[int] = (),
) -> Generation:
    """Continue a prompt greedily; an end-of-sequence token ends the answer and is part of it.

    Generated text reads the last media item of the prompt.
    """
    media = encode(model, pixels)
    ids, index, logprobs = list(token_ids), list(media_index), []
    while len(ids) < len(token_ids) + max_tokens:
        row = log_probs(model, ids, index, media, span_starts)[-1]
        allowed = row.clone()
        allowed[list(suppressed_ids)] = -torch.inf
        token_id = int(allowed.argmax())
        ids.append(token_id)
        index.append(index[-1])
        logprobs.append(float(row[token_id]))
        if token_id in eos_ids:
            break
    return Generation(ids[len(token_ids) :], logprobs)
