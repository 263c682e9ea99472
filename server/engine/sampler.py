"""Chooses the next token from logits, in each row by its own parameters, history and random number.

A row's random number comes from its sequence's generator, so a seed gives the same tokens whatever else is in the batch.
Log-probabilities are of the model's own distribution, before any of the parameters here.
"""

from __future__ import annotations

from collections import Counter, abc

import torch
from torch import Tensor

from kernels.likeliest import likeliest
from server.engine.sequence import Sequence
from server.wire import Sampling, TokenLogprob


class Sampler:
    """Samples token ids: `suppressed_ids` (media markers, padding) never, and `eos_ids` not before `min_tokens`."""

    def __init__(self, suppressed_ids: abc.Sequence[int], eos_ids: abc.Sequence[int]) -> None:
        self._suppressed = torch.tensor(suppressed_ids, dtype=torch.long)
        self._eos = list(eos_ids)

    def sample(self, logits: Tensor, sequences: abc.Sequence[Sequence]) -> Tensor:
        """Float32 logits [S, V], overwritten -> token ids [S]. Nothing here makes the host wait for the device."""
        logits.index_fill_(1, self._suppressed_on(logits.device), -torch.inf)
        for row, sequence in zip(logits, sequences, strict=True):
            self._shape(row, sequence)
        token_ids = logits.argmax(-1)
        random_rows = [i for i, sequence in enumerate(sequences) if sequence.sampling.temperature > 0]
        for truncate in (False, True):
            if rows := [i for i in random_rows if _is_truncated(sequences[i].sampling) == truncate]:
                uniform = [sequences[i].random.random() for i in rows]
                samplings = [sequences[i].sampling for i in rows]
                token_ids[rows] = draw(logits[rows], samplings, uniform, truncate=truncate)
        return token_ids

    def greedy(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [S, V], overwritten, of greedy sequences -> token ids [S], and whether each row is finite."""
        return likeliest(logits, self._suppressed_on(logits.device))

    def _suppressed_on(self, device: torch.device) -> Tensor:
        if self._suppressed.device != device:
            self._suppressed = self._suppressed.to(device)
        return self._suppressed

    def candidates(self, logprobs: Tensor, count: int) -> list[tuple[int, float]]:
        """Return a beam's `count` best next tokens from its log-probabilities [V], best first."""
        allowed = logprobs.index_fill(0, self._suppressed_on(logprobs.device), -torch.inf)
        values, ids = allowed.topk(count)
        return list(zip(ids.tolist(), values.tolist(), strict=True))

    def _shape(self, row: Tensor, sequence: Sequence) -> None:
        sampling = sequence.sampling
        if sequence.matcher is not None:
            allowed = torch.from_numpy(sequence.matcher.allowed(len(row)))
            row.masked_fill_(~allowed.to(row.device), -torch.inf)
        if sequence.num_output_tokens < sampling.min_tokens:
            row[self._eos + list(sampling.stop_token_ids)] = -torch.inf
        if sampling.logit_bias:
            ids = list(sampling.logit_bias)
            row[ids] += torch.tensor([sampling.logit_bias[i] for i in ids], device=row.device)
        if sampling.repetition_penalty != 1:
            _penalise_repetition(row, set(sequence.token_ids), sampling.repetition_penalty)
        if sampling.presence_penalty or sampling.frequency_penalty:
            _penalise_presence(row, Counter(sequence.token_ids[sequence.num_prompt_tokens :]), sampling)


def is_greedy(sequence: Sequence) -> bool:
    """Return whether the next token is the most likely one, with no change to the logits but suppressed ids."""
    sampling = sequence.sampling
    is_shaped = sequence.matcher is not None or sequence.num_output_tokens < sampling.min_tokens or sampling.logit_bias
    is_penalised = sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
    return not (sampling.temperature > 0 or sampling.beam_width or is_shaped or is_penalised)


def _penalise_repetition(row: Tensor, seen: set[int], penalty: float) -> None:
    """Divide positive logits of seen tokens, prompt included, and multiply negative ones (CTRL, Keskar et al., 2019)."""
    ids = torch.tensor(sorted(seen), device=row.device)
    values = row[ids]
    row[ids] = torch.where(values > 0, values / penalty, values * penalty)


def _penalise_presence(row: Tensor, counts: Counter[int], sampling: Sampling) -> None:
    """Penalise generated tokens, by presence once and by frequency once per occurrence (OpenAI's definition)."""
    if not counts:
        return
    ids = torch.tensor(list(counts), device=row.device)
    occurrences = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
    row[ids] -= sampling.presence_penalty + sampling.frequency_penalty * occurrences


def _is_truncated(sampling: Sampling) -> bool:
    return bool(sampling.top_k or sampling.top_p < 1 or sampling.min_p)


def draw(rows: Tensor, samplings: abc.Sequence[Sampling], uniform: abc.Sequence[float], *, truncate: bool) -> Tensor:
    """Sample by inverse transform: logits [R, V] and a number in [0, 1) per row -> token ids [R].

    With `truncate`, tokens are sorted by probability, and those outside top-k, top-p or min-p get none.
    """
    scaled = rows / _column([s.temperature for s in samplings], rows)
    if not truncate:
        return _invert(scaled.softmax(-1), uniform)
    values, ids = scaled.sort(dim=-1, descending=True, stable=True)
    probs = values.softmax(-1)
    before = probs.cumsum(-1) - probs  # the token whose probability reaches top-p is kept
    rank = torch.arange(probs.shape[-1], device=probs.device)
    keep = rank < _column([s.top_k or probs.shape[-1] for s in samplings], rows)
    keep &= before < _column([s.top_p for s in samplings], rows)
    keep &= probs >= _column([s.min_p for s in samplings], rows) * probs[:, :1]
    keep[:, 0] = True
    return ids.gather(1, _invert(torch.where(keep, probs, 0), uniform)[:, None])[:, 0]


def _column(values: abc.Sequence[float], rows: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=rows.device)[:, None]


def _invert(weights: Tensor, uniform: abc.Sequence[float]) -> Tensor:
    """Return the first index of each row [V] at which the running sum exceeds that fraction of the row's sum."""
    cumulative = weights.double().cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    targets = torch.tensor(uniform, dtype=torch.float64, device=weights.device)[:, None] * total
    index = torch.searchsorted(cumulative, targets, right=True)
    last = torch.searchsorted(cumulative, total)  # rounding may take a target past the last token with a weight
    return torch.minimum(index, last)[:, 0]


def token_logprobs(logprobs: Tensor, token_ids: abc.Sequence[int], num_top: abc.Sequence[int]) -> list[TokenLogprob]:
    """Log-probabilities [W, V] and the token of each row -> what is reported, with `num_top` alternatives per row."""
    if not token_ids:
        return []
    token_values = logprobs.gather(1, torch.tensor(token_ids, device=logprobs.device)[:, None])[:, 0].tolist()
    max_top = min(max(num_top), logprobs.shape[-1])
    values, ids = logprobs.topk(max_top) if max_top else (logprobs[:, :0], logprobs[:, :0].long())
    tops = [
        list(zip(i[:n], v[:n], strict=True)) for i, v, n in zip(ids.tolist(), values.tolist(), num_top, strict=True)
    ]
    return [TokenLogprob(t, value, top) for t, value, top in zip(token_ids, token_values, tops, strict=True)]
