"""Turns a step's logits into the result of each row: a token, the requested log-probabilities, or an error.

The last logits of each row are read even if nothing is sampled from them, to check that they are finite: other sequences
can share what a row wrote into the caches only after that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from server.engine.sampler import Sampler, is_greedy, token_logprobs
from server.engine.scheduler import Row
from server.wire import TokenLogprob

NOT_FINITE = "the model's output is not finite"


@dataclass(slots=True)
class Result:
    """The result of a row: a token, log-probabilities, or only K/V; or the `error` that fails its sequence."""

    row: Row
    token_id: int | None = None
    logprob: TokenLogprob | None = None
    # of tokens start + 1 .. of the prompt, in order
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    # of the sequence's targets, by position
    target_logprobs: dict[int, list[float]] = field(default_factory=dict)
    # of a beam, in place of a token
    candidates: list[tuple[int, float]] = field(default_factory=list)
    error: str = ""


def logit_positions(row: Row) -> range:
    """Return the positions whose logits are read: those after which log-probabilities are reported, and the last one."""
    end, scored = row.start + row.count, row.sequence.scored
    first = max(row.start, scored.start) if row.start < scored.stop else end - 1
    return range(min(first, end - 1), end)


def read_logits(rows: Sequence[Row], positions: Sequence[range], logits: Tensor, sampler: Sampler) -> list[Result]:
    """Read logits [W, V] of the model's dtype, of which `len(positions[i])` belong to row i. They are overwritten."""
    if len(logits) == len(rows) and all(map(_is_greedy, rows)):
        return _read_greedy(rows, logits, sampler)
    logits = logits.float()
    results = [Result(row) for row in rows]
    parts = logits.split(list(map(len, positions)))
    # a row's maximum is NaN if any of its logits is
    is_finite = logits.amax(-1).isfinite()
    sampling = [i for i, row in enumerate(rows) if row.samples and not row.sequence.targets]
    token_ids = _choose([results[i] for i in sampling], [parts[i][-1] for i in sampling], sampler)
    for result, is_part_finite in zip(results, is_finite.split(list(map(len, positions))), strict=True):
        if not bool(is_part_finite.all()):
            result.error = NOT_FINITE
    for i, token_id in zip(sampling, token_ids.tolist(), strict=True):
        results[i].token_id = token_id
    _report_logprobs(results, positions, parts)
    _report_targets(results, positions, logits)
    return results


def num_candidates(beam_width: int) -> int:
    """Return how many candidates each beam reports: enough to continue all beams even if each of them could end."""
    return 2 * beam_width


def _is_greedy(row: Row) -> bool:
    """Return whether at most the most likely token is read from the row's logits."""
    sequence = row.sequence
    reports_logprobs = sequence.targets or sequence.sampling.logprobs is not None or sequence.wants_prompt_logprobs
    return not reports_logprobs and (not row.samples or is_greedy(sequence))


def _read_greedy(rows: Sequence[Row], logits: Tensor, sampler: Sampler) -> list[Result]:
    token_ids, is_finite = sampler.greedy(logits)
    return [
        Result(row, token_id=token_id if row.samples else None, error="" if is_row_finite else NOT_FINITE)
        for row, token_id, is_row_finite in zip(rows, token_ids.tolist(), is_finite.tolist(), strict=True)
    ]


def _choose(results: list[Result], logits: list[Tensor], sampler: Sampler) -> Tensor:
    """Sample for each result; the ids stay on the device. Beams get candidates as well."""
    sequences = [result.row.sequence for result in results]
    for result, sequence, row in zip(results, sequences, logits, strict=True):
        if width := sequence.sampling.beam_width:
            result.candidates = sampler.candidates(row.log_softmax(-1), num_candidates(width))
    return sampler.sample(torch.stack(logits), sequences) if logits else torch.empty(0)


def _report_logprobs(results: list[Result], positions: Sequence[range], parts: Sequence[Tensor]) -> None:
    """Set the log-probabilities of prompts and of sampled tokens that the requests ask for."""
    for result, span, part in zip(results, positions, parts, strict=True):
        if result.error:
            continue
        sampling = result.row.sequence.sampling
        if result.row.sequence.wants_prompt_logprobs:
            result.prompt_logprobs = _prompt_logprobs(result.row, span, part)
        if sampling.logprobs is not None and result.token_id is not None:
            row = part[-1:].log_softmax(-1)
            (result.logprob,) = token_logprobs(row, [result.token_id], [sampling.logprobs])


def _prompt_logprobs(row: Row, positions: range, logits: Tensor) -> list[TokenLogprob]:
    """Return the log-probabilities of the prompt tokens that follow `positions`; none follows the last prompt token."""
    sequence = row.sequence
    following = [sequence.token_ids[at + 1] for at in positions if at + 1 < sequence.num_prompt_tokens]
    num_top = [sequence.sampling.prompt_logprobs or 0] * len(following)
    return token_logprobs(logits[: len(following)].log_softmax(-1), following, num_top)


def _report_targets(results: list[Result], positions: Sequence[range], logits: Tensor) -> None:
    """Set the targets' log-probabilities of all rows at once: many candidates are a step of many short rows."""
    starts = accumulate(map(len, positions), initial=0)
    targets = [
        (result, position, start + offset, result.row.sequence.targets[position])
        for result, start, span in zip(results, starts, positions, strict=False)
        for offset, position in enumerate(span)
        if position in result.row.sequence.targets and not result.error
    ]
    if not targets:
        return
    logprobs = logits[[row for _, _, row, _ in targets]].log_softmax(-1)
    rows = [row for row, (_, _, _, ids) in enumerate(targets) for _ in ids]
    values = iter(logprobs[rows, [i for _, _, _, ids in targets for i in ids]].tolist())
    for result, position, _, ids in targets:
        result.target_logprobs[position] = [next(values) for _ in ids]
