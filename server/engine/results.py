"""From a step's logits to what each row gave: a token, log-probabilities that were asked for, or the news that it failed.

Each row's last logits are read even where nobody wants them, to see that they are finite: what a row wrote into the caches
is found by others only after that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from server.engine.sampler import Sampler, is_greedy, token_logprobs
from server.engine.scheduler import Row
from server.wire import TokenLogprob

NOT_FINITE = "the model's output is not finite"


@dataclass(slots=True)
class Result:
    """What a row of the plan gave: nothing but K/V, or log-probabilities, or a token; or `failed`."""

    row: Row
    token_id: int | None = None
    logprob: TokenLogprob | None = None
    # for tokens start + 1 .. of the prompt, in order
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    # of the sequence's targets, by position
    target_logprobs: dict[int, list[float]] = field(default_factory=dict)
    # of a beam, instead of a token
    candidates: list[tuple[int, float]] = field(default_factory=list)
    failed: str = ""


def wanted_tokens(row: Row) -> range:
    """The tokens whose logits are read: those that are scored, and the last one."""
    end, scored = row.start + row.count, row.sequence.scored
    first = max(row.start, scored.start) if row.start < scored.stop else end - 1
    return range(min(first, end - 1), end)


def read_logits(rows: Sequence[Row], wanted: Sequence[range], logits: Tensor, sampler: Sampler) -> list[Result]:
    """Logits [W, V] of the model's dtype, spent; `len(wanted[i])` of them for row i."""
    if len(logits) == len(rows) and all(map(_is_greedy, rows)):
        return _read_likeliest(rows, logits, sampler)
    logits = logits.float()
    results = [Result(row) for row in rows]
    parts = logits.split([len(tokens) for tokens in wanted])
    # a row's maximum is NaN where any of its logits is
    is_finite = logits.amax(-1).isfinite()
    sampling = [i for i, row in enumerate(rows) if row.samples and not row.sequence.targets]
    chosen = _choose([results[i] for i in sampling], [parts[i][-1] for i in sampling], sampler)
    for result, good in zip(results, is_finite.split([len(tokens) for tokens in wanted]), strict=True):
        if not bool(good.all()):
            result.failed = NOT_FINITE
    for i, token_id in zip(sampling, chosen.tolist(), strict=True):
        results[i].token_id = token_id
    _report(results, wanted, parts)
    _report_targets(results, wanted, logits)
    return results


def _is_greedy(row: Row) -> bool:
    """Whether nothing is asked of the row's logits but the likeliest token, if that."""
    sequence = row.sequence
    asks_more = sequence.targets or sequence.sampling.logprobs is not None or sequence.wants_prompt_logprobs
    return not asks_more and (not row.samples or is_greedy(sequence))


def _read_likeliest(rows: Sequence[Row], logits: Tensor, sampler: Sampler) -> list[Result]:
    token_ids, is_finite = sampler.likeliest(logits)
    return [
        Result(row, token_id=token_id if row.samples else None, failed="" if good else NOT_FINITE)
        for row, token_id, good in zip(rows, token_ids.tolist(), is_finite.tolist(), strict=True)
    ]


def _choose(results: list[Result], logits: list[Tensor], sampler: Sampler) -> Tensor:
    """Sample, for the rows that do; the ids are still on the device. Beams get candidates instead."""
    sequences = [result.row.sequence for result in results]
    for result, sequence, row in zip(results, sequences, logits, strict=True):
        if width := sequence.sampling.beam_width:
            result.candidates = sampler.candidates(row.log_softmax(-1), num_candidates(width))
    return sampler.sample(torch.stack(logits), sequences) if logits else torch.empty(0)


def num_candidates(beam_width: int) -> int:
    """Return how many candidates each beam reports: enough to continue all beams even if each of them could end."""
    return 2 * beam_width


def _report(results: list[Result], wanted: Sequence[range], parts: Sequence[Tensor]) -> None:
    """Log-probabilities, of prompts and of sampled tokens, for those who asked."""
    for result, tokens, part in zip(results, wanted, parts, strict=True):
        if result.failed:
            continue
        sampling = result.row.sequence.sampling
        if result.row.sequence.wants_prompt_logprobs:
            result.prompt_logprobs = _prompt_logprobs(result.row, tokens, part)
        if sampling.logprobs is not None and result.token_id is not None:
            row = part[-1:].log_softmax(-1)
            (result.logprob,) = token_logprobs(row, [result.token_id], [sampling.logprobs])


def _prompt_logprobs(row: Row, tokens: range, logits: Tensor) -> list[TokenLogprob]:
    """Of the prompt tokens that follow `tokens`; the last prompt token is followed by none."""
    sequence = row.sequence
    following = [sequence.token_ids[t + 1] for t in tokens if t + 1 < sequence.num_prompt_tokens]
    num_top = [sequence.sampling.prompt_logprobs or 0] * len(following)
    return token_logprobs(logits[: len(following)].log_softmax(-1), following, num_top)


def _report_targets(results: list[Result], wanted: Sequence[range], logits: Tensor) -> None:
    """All rows' targets at once: many candidates are a step of many short rows."""
    starts = [0]
    for tokens in wanted:
        starts.append(starts[-1] + len(tokens))
    asked = [
        (result, position, start + place, result.row.sequence.targets[position])
        for result, start, tokens in zip(results, starts, wanted, strict=False)
        for place, position in enumerate(tokens)
        if position in result.row.sequence.targets and not result.failed
    ]
    if not asked:
        return
    logprobs = logits[[row for _, _, row, _ in asked]].log_softmax(-1)
    rows = [row for row, (_, _, _, ids) in enumerate(asked) for _ in ids]
    values = iter(logprobs[rows, [i for _, _, _, ids in asked for i in ids]].tolist())
    for result, position, _, ids in asked:
        result.target_logprobs[position] = [next(values) for _ in ids]
