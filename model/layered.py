"""A forward of whole sequences without a cache, in pieces: each piece takes a few tokens through one layer.

The engine runs steps between two pieces. All tokens pass a layer before any of them passes the next. So only the keys and
values of one layer are kept, and only if a sequence is longer than a piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from model.batch import Batch, whole_sequences
from model.language_model import LanguageModel, StepContext

BLOCK_SIZE = 16


class LayeredForward:
    """The hidden states `x` [T, D] of sequences between two layers, divided into `spans` of up to `max_tokens` tokens.

    Several sequences form one span: together they must have at most `max_tokens` tokens.
    """

    def __init__(self, model: LanguageModel, token_ids: Sequence[Sequence[int]], max_tokens: int) -> None:
        self._model = model
        self._batch = whole_sequences(token_ids, [[-1] * len(ids) for ids in token_ids], model.embed.weight.device)
        self.x = model.embed_tokens(self._batch)
        self.spans = _spans(len(self.x), max_tokens)
        assert len(self.spans) == 1 or len(token_ids) == 1
        self._whole = model.step_context(self._batch, self.x.dtype) if len(self.spans) == 1 else None
        self._kv = None if self._whole else self._empty_blocks()

    def run(self, layer: nn.Module) -> Iterator[int]:
        """Take all tokens through a layer, and yield the number of tokens after each span."""
        for span in self.spans:
            self.x[span] = layer(self.x[span], self._whole or self._context(span), self._kv)
            yield span.stop - span.start

    def hidden_states(self) -> Tensor:
        """Return the input of the head for each token, [T, D], after the last layer."""
        return self._model.norm(self.x)

    def _empty_blocks(self) -> Tensor:
        config = self._model.config
        num_blocks = -(-len(self.x) // BLOCK_SIZE)
        return self.x.new_zeros(num_blocks, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)

    def _context(self, span: slice) -> StepContext:
        """Return the context of a span that attends to itself and to all spans before it.

        It is computed again for each layer: the masks of all spans together have the size of the length squared.
        """
        assert self._kv is not None
        device = self.x.device
        batch = Batch(
            token_ids=self._batch.token_ids[span],
            positions=self._batch.positions[span],
            media_slot=None,
            query_starts=torch.tensor([0, span.stop - span.start], dtype=torch.int32, device=device),
            last_token=self._batch.last_token[:0],
            context_lengths=torch.tensor([span.stop], dtype=torch.int32, device=device),
            block_table=torch.arange(len(self._kv), dtype=torch.int32, device=device)[None],
            slot_mapping=torch.arange(span.start, span.stop, device=device),
        )
        return self._model.step_context(batch, self.x.dtype, self._kv)


def _spans(num_tokens: int, max_tokens: int) -> list[slice]:
    """Return spans of almost equal lengths: a product of few rows may be less exact than one of many."""
    count = max(-(-num_tokens // max_tokens), 1)
    ends = [num_tokens * i // count for i in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]
