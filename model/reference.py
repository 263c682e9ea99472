"""Generation with no cache and no kernels: the oracle that everything faster is tested against.

Each step runs the whole sequence again. One sequence at a time, greedy; plain to read and slow on purpose.
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
    """A page for each media; `pixels` holds one [F, 3, h, w] a media."""
    config = model.config
    if not pixels:
        return MediaPages.zeros(config, 0, next(model.parameters()).dtype, next(model.parameters()).device)
    return model.fresh_media(torch.cat([model.encode_media(p[None]) for p in pixels]))


@torch.inference_mode()
def log_probs(model: Flamingo, token_ids: Sequence[int], media_index: Sequence[int], media: MediaPages) -> Tensor:
    """Log-probabilities [T, V + A] float32 of what follows each token."""
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
    """Greedy continuation; an end-of-sequence token ends it and is part of the answer. Generated text reads the last
    media of the prompt."""
    media = encode(model, pixels)
    ids, index, logprobs = list(token_ids), list(media_index), []
    while len(ids) < len(token_ids) + max_tokens:
        row = log_probs(model, ids, index, media)[-1]
        allowed = row.clone()
        allowed[list(suppressed_ids)] = -torch.inf
        best = int(allowed.argmax())
        ids.append(best)
        index.append(index[-1])
        logprobs.append(float(row[best]))
        if best in eos_ids:
            break
    return Generation(ids[len(token_ids) :], logprobs)
