"""From logits to the next token. Every choice is a row's own: its parameters, its history, its random number.

A row's random number comes from its sequence's generator, so a seed gives the same tokens whatever else is in the batch.
Log-probabilities are of the model's own distribution, before any of the parameters here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from kernels.greedy_argmax import greedy_argmax
from server.engine.sequence import Sequence
from server.wire import Sampling, TokenLogprob


class Sampler:
    """`suppressed_ids` (media markers, padding) are never sampled; `eos_ids` not before `min_tokens`."""

    def __init__(self, suppressed_ids: Rows[int], eos_ids: Rows[int]) -> None:
        self._suppressed = torch.tensor(suppressed_ids, dtype=torch.long)
        self._eos = list(eos_ids)

    def sample(self, logits: Tensor, sequences: Rows[Sequence]) -> Tensor:
        """Float32 logits [S, V] -> token ids [S]. The logits are spent. Nothing here makes the host wait."""
        logits.index_fill_(1, self._suppressed_on(logits.device), -torch.inf)
        for row, sequence in zip(logits, sequences, strict=True):
            self._shape(row, sequence)
        chosen = logits.argmax(-1)
        drawn = [i for i, sequence in enumerate(sequences) if sequence.sampling.temperature > 0]
        for cut in (False, True):
            if rows := [i for i in drawn if _is_cut(sequences[i].sampling) == cut]:
                uniform = [sequences[i].random.random() for i in rows]
                chosen[rows] = draw(logits[rows], [sequences[i].sampling for i in rows], uniform, cut=cut)
        return chosen

    def likeliest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [S, V], spent, of sequences that are all greedy -> token ids [S], and whether each row is finite."""
        return greedy_argmax(logits, self._suppressed_on(logits.device))

    def _suppressed_on(self, device: torch.device) -> Tensor:
        if self._suppressed.device != device:
            self._suppressed = self._suppressed.to(device)
        return self._suppressed

    def candidates(self, logprobs: Tensor, count: int) -> list[tuple[int, float]]:
        """A beam's best next tokens from its log-probabilities [V], best first."""
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
            _repetition(row, set(sequence.token_ids), sampling.repetition_penalty)
        if sampling.presence_penalty or sampling.frequency_penalty:
            _presence_and_frequency(row, Counter(sequence.token_ids[sequence.num_prompt_tokens :]), sampling)


def is_greedy(sequence: Sequence) -> bool:
    """Whether its next token is the likeliest one, of logits that nothing shapes but what is never sampled."""
    sampling = sequence.sampling
    is_shaped = sequence.matcher is not None or sequence.num_output_tokens < sampling.min_tokens or sampling.logit_bias
    is_penalised = sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
    return not (sampling.temperature > 0 or sampling.beam_width or is_shaped or is_penalised)


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


def _is_cut(sampling: Sampling) -> bool:
    return bool(sampling.top_k or sampling.top_p < 1 or sampling.min_p)


def draw(rows: Tensor, samplings: Rows[Sampling], uniform: Rows[float], *, cut: bool) -> Tensor:
    """Inverse-transform sampling, each row [V] by its own number in [0, 1): -> token ids [R].

    With `cut`, tokens are taken in falling order and those beyond top-k, top-p or min-p have no share.
    """
    scaled = rows / _column([s.temperature for s in samplings], rows)
    if not cut:
        return _invert(scaled.softmax(-1), uniform)
    values, ids = scaled.sort(dim=-1, descending=True, stable=True)
    probs = values.softmax(-1)
    before = probs.cumsum(-1) - probs  # the token that crosses the line of top-p stays
    rank = torch.arange(probs.shape[-1], device=probs.device)
    keep = rank < _column([s.top_k or probs.shape[-1] for s in samplings], rows)
    keep &= before < _column([s.top_p for s in samplings], rows)
    keep &= probs >= _column([s.min_p for s in samplings], rows) * probs[:, :1]
    keep[:, 0] = True
    return ids.gather(1, _invert(torch.where(keep, probs, 0), uniform)[:, None])[:, 0]


def _column(values: Rows[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _invert(weights: Tensor, uniform: Rows[float]) -> Tensor:
    """The first place of each row [V] where the running sum passes that share of the whole."""
    cumulative = weights.double().cumsum(-1)
    whole = cumulative[:, -1:].contiguous()
    targets = torch.tensor(uniform, dtype=torch.float64, device=weights.device)[:, None] * whole
    place = torch.searchsorted(cumulative, targets, right=True)
    last = torch.searchsorted(cumulative, whole)  # rounding may take a target past the last token with a share
    return torch.minimum(place, last)[:, 0]


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
