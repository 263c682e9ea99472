"""Generation without a cache: the oracle that every faster path is tested against.

It runs one sequence at a time, greedily, and the whole sequence again in each step: simple, and slow on purpose.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import NO_CACHE, MediaPages, whole_sequences
from model.flamingo import Flamingo


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
def log_probs(model: Flamingo, token_ids: Sequence[int], media_index: Sequence[int], media: MediaPages) -> Tensor:
    """Return the log-probabilities [T, V + A], in float32, of the token that follows each token."""
    device = next(model.parameters()).device
    batch = whole_sequences([token_ids], [model.media_slots(media_index)], device)
    return model(batch, NO_CACHE, media).float().log_softmax(-1)


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
) -> Generation:
    """Continue a prompt greedily; an end-of-sequence token ends the answer and is part of it.

    Generated text reads the last media item of the prompt.
    """
    media = encode(model, pixels)
    ids, index, logprobs = list(token_ids), list(media_index), []
    while len(ids) < len(token_ids) + max_tokens:
        row = log_probs(model, ids, index, media)[-1]
        allowed = row.clone()
        allowed[list(suppressed_ids)] = -torch.inf
        token_id = int(allowed.argmax())
        ids.append(token_id)
        index.append(index[-1])
        logprobs.append(float(row[token_id]))
        if token_id in eos_ids:
            break
    return Generation(ids[len(token_ids) :], logprobs)
