"""Chooses the next tokens of rows from their logits, by each sequence's parameters, history and random number.

The parameters of all rows are a few tables, which go to the device together. Nothing here makes the host wait for it.
"""

from __future__ import annotations

from collections import Counter, abc
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from server.engine.sequence import Sequence
from server.wire import Sampling

TINY = torch.finfo(torch.float32).tiny
# leaves room below infinity, so that no sum with a penalty or bias becomes infinite
LARGEST = torch.finfo(torch.float32).max / 4
LOWEST = torch.finfo(torch.float32).min

Change: TypeAlias = abc.Callable[[Tensor, Tensor], Tensor]


NO_EDITS = (torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0))  # the index and the values


class Choice:
    """The choice of one token for each of these sequences; `tables` are what the device needs for it."""

    def __init__(self, sequences: abc.Sequence[Sequence], eos_ids: abc.Sequence[int], width: int) -> None:
        random_rows = [i for i, sequence in enumerate(sequences) if sequence.sampling.is_random]
        self._plain = [i for i in random_rows if not _is_truncated(sequences[i].sampling)]
        self._truncated = [i for i in random_rows if _is_truncated(sequences[i].sampling)]
        drawn = [sequences[i] for i in (*self._plain, *self._truncated)]
        masks = {i: _permitted(sequence, width) for i, sequence in enumerate(sequences) if sequence.matcher is not None}
        self._masked = list(masks)
        self._num_rows = len(sequences)
        self._edits = Edits(sequences, eos_ids)
        self.tables = [
            *self._edits.tables,
            torch.tensor([*self._plain, *self._truncated], dtype=torch.int64),
            parameters([sequence.sampling for sequence in drawn], [s.random.random() for s in drawn]),
            *masks.values(),
        ]

    def token_ids(self, logits: Tensor, *tables: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 logits [S, V], overwritten, and the tables on the device -> ids [S], and whether each row permits any."""
        index, values, rows, drawing, *masks = tables
        for row, mask in zip(self._masked, masks, strict=True):
            logits[row].masked_fill_(~mask, -torch.inf)
        if len(values):
            self._edits.apply(logits, index, values)
        token_ids = logits.argmax(-1)
        is_permitted = logits.gather(1, token_ids[:, None])[:, 0].isfinite()
        first = 0
        for group, truncate in ((self._plain, False), (self._truncated, True)):
            part = slice(first, first + len(group))
            if len(group) == self._num_rows:  # nothing has to be gathered
                return draw(logits, drawing, truncate=truncate), is_permitted
            if group:
                drawn = draw(logits[rows[part]], drawing[:, part], truncate=truncate)
                token_ids.index_copy_(0, rows[part], drawn)
            first = part.stop
        return token_ids, is_permitted


class Edits:
    """Changes of single logits: those of all rows that are of one kind are made at once, one kind after the other."""

    def __init__(self, sequences: abc.Sequence[Sequence], eos_ids: abc.Sequence[int]) -> None:
        edits = [(row, edit) for row, sequence in enumerate(sequences) for edit in _edits(sequence, eos_ids)]
        edits.sort(key=lambda item: item[1].kind)
        self.tables = NO_EDITS
        if not edits:
            return
        rows = [row for row, edit in edits for _ in edit.ids]
        self._counts = [sum(len(edit.ids) for _, edit in edits if edit.kind == kind) for kind in range(len(CHANGES))]
        self.tables = (
            torch.tensor([rows, [token_id for _, edit in edits for token_id in edit.ids]], dtype=torch.int64),
            torch.tensor([value for _, edit in edits for value in edit.values], dtype=torch.float32),
        )

    def apply(self, logits: Tensor, index: Tensor, values: Tensor) -> None:
        """Change logits [S, V] by the tables on their device."""
        parts = zip(index.split(self._counts, 1), values.split(self._counts), CHANGES, strict=True)
        for (rows, ids), numbers, change in parts:
            if len(numbers):
                logits[rows, ids] = change(logits[rows, ids], numbers)


class Edit(NamedTuple):
    """Changes of one row's logits: the kind is an index of `CHANGES`, and there is a number for each id."""

    kind: int
    ids: abc.Sequence[int]
    values: abc.Sequence[float]


def _edits(sequence: Sequence, eos_ids: abc.Sequence[int]) -> abc.Iterator[Edit]:
    sampling = sequence.sampling
    if forbidden := ids_that_end(sequence, eos_ids):
        yield Edit(0, forbidden, [0.0] * len(forbidden))
    if sampling.logit_bias:
        yield Edit(1, list(sampling.logit_bias), list(sampling.logit_bias.values()))
    if sampling.repetition_penalty != 1:
        seen = sorted(set(sequence.token_ids))
        # 0 times minus infinity would be NaN
        yield Edit(2, seen, [max(sampling.repetition_penalty, TINY)] * len(seen))
    if sampling.presence_penalty or sampling.frequency_penalty:
        counts = Counter(sequence.token_ids[sequence.num_prompt_tokens :])
        occurrences = np.fromiter(counts.values(), np.float32, len(counts))
        penalties = np.float32(sampling.presence_penalty) + np.float32(sampling.frequency_penalty) * occurrences
        yield Edit(3, list(counts), penalties.tolist())


def ids_that_end(sequence: Sequence, eos_ids: abc.Sequence[int]) -> list[int]:
    """Return the ids that end a sequence, if it has fewer than `min_tokens` tokens, so that they are forbidden."""
    if sequence.num_output_tokens >= sequence.sampling.min_tokens:
        return []
    return [*eos_ids, *sequence.sampling.stop_token_ids]


def forbid(logits: Tensor, _: Tensor) -> Tensor:
    return torch.full_like(logits, -torch.inf)


def _penalise_repetition(logits: Tensor, penalties: Tensor) -> Tensor:
    """Divide positive logits of seen tokens, prompt included, and multiply negative ones (CTRL, Keskar et al., 2019).

    Permitted tokens stay permitted: only a logit of minus infinity gives minus infinity.
    """
    penalised = torch.where(logits > 0, logits / penalties, logits * penalties).clamp(LOWEST, LARGEST)
    return penalised.masked_fill(logits.isneginf(), -torch.inf)


# the last one penalises generated tokens, by presence once and by frequency once per occurrence (OpenAI's definition)
CHANGES: tuple[Change, ...] = (forbid, torch.add, _penalise_repetition, torch.sub)


def _permitted(sequence: Sequence, width: int) -> Tensor:
    """Return which ids the sequence's grammar permits next, bool [V]."""
    matcher, sampling = sequence.matcher, sequence.sampling
    assert matcher is not None
    ends = matcher.must_end(sampling.max_tokens - sequence.num_output_tokens, sampling.max_tokens)
    return torch.from_numpy(matcher.allowed(width, ends=ends))


def _is_truncated(sampling: Sampling) -> bool:
    return bool(sampling.top_k or sampling.top_p < 1 or sampling.min_p)


def parameters(samplings: abc.Sequence[Sampling], uniform: abc.Sequence[float]) -> Tensor:
    """Return the parameters of rows and a number in [0, 1) for each, as the table [5, R] that `draw` takes."""
    columns = [(s.temperature, s.top_k or np.inf, s.top_p, s.min_p) for s in samplings]
    return torch.tensor([*zip(*columns, strict=True), uniform] if columns else [[]] * 5, dtype=torch.float64)


def draw(logits: Tensor, drawing: Tensor, *, truncate: bool) -> Tensor:
    """Sample by inverse transform: logits [R, V] and the table of their parameters -> token ids [R].

    With `truncate`, tokens are sorted by probability, and those outside top-k, top-p or min-p get none.
    """
    columns = drawing[:, :, None]
    uniform = columns[4]
    # the largest becomes 0 first: no temperature takes it to infinity
    scaled = (logits - logits.amax(-1, keepdim=True)) / columns[0].float()
    if not truncate:
        return _invert(scaled.softmax(-1), uniform)
    top_k, top_p, min_p = columns[1:4].float()
    values, ids = scaled.sort(dim=-1, descending=True, stable=True)
    probs = values.softmax(-1)
    before = probs.cumsum(-1) - probs  # the token whose probability reaches top-p is kept
    keep = torch.arange(probs.shape[-1], device=probs.device) < top_k
    keep &= before < top_p
    keep &= probs >= min_p * probs[:, :1]
    keep[:, 0] = True
    return ids.gather(1, _invert(torch.where(keep, probs, 0), uniform)[:, None])[:, 0]


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return the first index of each row [V] at which the running sum exceeds that fraction [R, 1] of the row's sum.

    Of a row with NaN, it returns any index.
    """
    cumulative = weights.double().cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    index = torch.searchsorted(cumulative, uniform * total, right=True)
    last = torch.searchsorted(cumulative, total)  # rounding may take a target past the last token with a weight
    return torch.minimum(index, last).clamp(max=weights.shape[-1] - 1)[:, 0]
