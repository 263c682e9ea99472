"""The forward's first layers alone: what the decoder holds of a picture once two gated layers have read it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from model.batch import Batch, MediaPages, whole_sequences
from model.flamingo import Flamingo
from model.tokenizer import PromptTokenizer

DEPTH = 5  # decoder layers that are run: two gated layers are among them
BEFORE, BEHIND = "\n", "Output:"


def early_states(model: Flamingo, batch: Batch, media: MediaPages) -> Tensor:
    """[T, D] behind `DEPTH` decoder layers."""
    decoder = model.language_model
    x = decoder.embed_tokens(batch)
    step = decoder.step_context(batch, x.dtype)
    for i, gated, layer in model.layers()[:DEPTH]:
        if gated is not None:
            x = gated(x, media.layer(i), batch.media_slot)
        x = layer(x, step, None)
    return x


def one_image(tokenizer: PromptTokenizer) -> tuple[int, ...]:
    """A prompt of one image, which its second token is."""
    before, behind = tokenizer.encode_plain(BEFORE), tokenizer.encode_plain(BEHIND)
    return (*before, tokenizer.media_token_id, *behind)


def media_states(model: Flamingo, media: MediaPages, prompt: Sequence[int]) -> Tensor:
    """[M, D]: of each page, the state behind a prompt that shows it alone."""
    pages = range(len(media.pages))
    reads = [[-1] + [page] * (len(prompt) - 1) for page in pages]
    batch = whole_sequences([list(prompt) for _ in pages], reads, media.pages.device)
    return early_states(model, batch, media)[batch.query_starts[1:].long() - 1]
