"""Computes the decoder's state of an image after its first layers, in which two gated layers have read the image."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from model.batch import Batch, MediaPages, whole_sequences
from model.flamingo import Flamingo
from model.prompt import PromptTokenizer

NUM_LAYERS = 5  # the decoder layers that run; two gated layers run before some of them
PREFIX, SUFFIX = "\n", "Output:"


def early_states(model: Flamingo, batch: Batch, media: MediaPages) -> Tensor:
    """Return the states [T, D] after the first `NUM_LAYERS` decoder layers."""
    decoder = model.language_model
    x = decoder.embed_tokens(batch)
    context = decoder.step_context(batch, x.dtype)
    for i, gated, layer in model.layers()[:NUM_LAYERS]:
        if gated is not None:
            x = gated(x, media.layer(i), batch.media_slot)
        x = layer(x, context, None)
    return x


def single_image_prompt(tokenizer: PromptTokenizer) -> tuple[int, ...]:
    """Return a prompt of one image, whose media token is the second token."""
    prefix, suffix = tokenizer.encode_plain(PREFIX), tokenizer.encode_plain(SUFFIX)
    return (*prefix, tokenizer.media_token_id, *suffix)


def media_states(model: Flamingo, media: MediaPages, prompt: Sequence[int]) -> Tensor:
    """Return each page's state [M, D] at the end of a prompt that shows the page alone."""
    pages = range(len(media.pages))
    media_slots = [[-1] + [page] * (len(prompt) - 1) for page in pages]
    batch = whole_sequences([list(prompt) for _ in pages], media_slots, media.pages.device)
    return early_states(model, batch, media)[batch.query_starts[1:].long() - 1]
