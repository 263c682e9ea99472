"""From logits to the next token. Every choice is a row's own: its parameters, its history, its random number.

A row's random number comes from its sequence's generator, so a seed gives the same tokens whatever else is in the batch.
Log-probabilities are of the model's own distribution, before any of the parameters here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from server.engine.sequence import Sequence
from server.engine.wire import Sampling, TokenLogprob


class Sampler:
    """`suppressed_ids` (media markers, padding) are never sampled; `eos_ids` not before `min_tokens`."""

    def __init__(self, suppressed_ids: Rows[int], eos_ids: Rows[int]) -> None:
        self._suppressed = list(suppressed_ids)
        self._eos = list(eos_ids)

    def sample(self, logits: Tensor, sequences: Rows[Sequence]) -> list[int]:
        """Float32 logits [S, V] -> one token id a sequence. The logits are spent."""
        logits[:, self._suppressed] = -torch.inf
        for row, sequence in zip(logits, sequences, strict=True):
            self._shape(row, sequence)
        chosen = logits.argmax(-1).tolist()
        for i, sequence in enumerate(sequences):
            if sequence.sampling.temperature > 0:
                chosen[i] = draw(logits[i], sequence.sampling, sequence.random.random())
        return chosen

    def candidates(self, logprobs: Tensor, count: int) -> list[tuple[int, float]]:
        """A beam's best next tokens from its log-probabilities [V], best first."""
        allowed = logprobs.index_fill(0, torch.tensor(self._suppressed, device=logprobs.device), -torch.inf)
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
            _repetition(row, set(sequence.token_ids), sampling.repetition_penalty)
        if sampling.presence_penalty or sampling.frequency_penalty:
            _presence_and_frequency(row, Counter(sequence.token_ids[sequence.num_prompt_tokens :]), sampling)


def _repetition(row: Tensor, seen: set[int], penalty: float) -> None:
    """Seen tokens, prompt included: positive logits divided, negative ones multiplied (CTRL, Keskar et al., 2019)."""
    ids = torch.tensor(sorted(seen), device=row.device)
    values = row[ids]
    row[ids] = torch.where(values > 0, values / penalty, values * penalty)


def _presence_and_frequency(row: Tensor, counts: Counter[int], sampling: Sampling) -> None:
    """Generated tokens: once for being there, and once for each time (OpenAI's definition)."""
    if not counts:
        return
    ids = torch.tensor(list(counts), device=row.device)
    times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
    row[ids] -= sampling.presence_penalty + sampling.frequency_penalty * times


def draw(row: Tensor, sampling: Sampling, uniform: float) -> int:
    """Inverse-transform sampling from one row [V]: the tokens in falling order, cut by top-k, top-p and min-p."""
    values, ids = (row / sampling.temperature).sort(descending=True, stable=True)
    probs = values.softmax(-1)
    keep = torch.ones_like(probs, dtype=torch.bool)
    if sampling.top_k:
        keep[sampling.top_k :] = False
    if sampling.top_p < 1:
        keep &= (probs.cumsum(-1) - probs) < sampling.top_p  # the token that crosses the line stays
    if sampling.min_p:
        keep &= probs >= sampling.min_p * probs[0]
    cumulative = torch.where(keep, probs, 0).double().cumsum(-1)
    place = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True))
    return int(ids[min(place, int(keep.sum()) - 1)])


def token_logprobs(logprobs: Tensor, token_ids: Rows[int], num_top: Rows[int]) -> list[TokenLogprob]:
    """Log-probabilities [W, V] and the token of each row -> what is reported, with `num_top` alternatives a row."""
    if not token_ids:
        return []
    own = logprobs.gather(1, torch.tensor(token_ids, device=logprobs.device)[:, None])[:, 0].tolist()
    most = max(num_top)
    values, ids = logprobs.topk(min(most, logprobs.shape[-1])) if most else (logprobs[:, :0], logprobs[:, :0].long())
    tops = [
        list(zip(i[:n], v[:n], strict=True)) for i, v, n in zip(ids.tolist(), values.tolist(), num_top, strict=True)
    ]
    return [TokenLogprob(t, value, top) for t, value, top in zip(token_ids, own, tops, strict=True)]
