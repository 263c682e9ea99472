"""Turns a step's logits into the result of each row: a token, the requested log-probabilities, or an error.

Each row's token is chosen by its own parameters, history and random number, which comes from its sequence's generator: a
seed gives the same tokens whatever else is in the batch. Log-probabilities are of the model's own distribution, before any
of the parameters. The last logits of each row are read even if nothing is sampled from them, to check that they are
finite: other sequences can share what a row wrote into the caches only after that.

Whatever the logits and the parameters are, an id is in the vocabulary, and a row without a permitted token fails alone.
"""

from __future__ import annotations

from collections import Counter, abc
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from kernels.rows import greedy_argmax
from server.engine.plan import Row
from server.engine.sequence import Sequence
from server.wire import Sampling, TokenLogprob

NOT_FINITE = "the model's output is not finite"
NOTHING_PERMITTED = "with the other options, no next token is permitted"
TINY = torch.finfo(torch.float32).tiny
# room below infinity, so that no penalty or bias takes a sum there
LARGEST = torch.finfo(torch.float32).max / 4
# rows of log-probabilities that are computed at once: a step of prompt tokens times a vocabulary takes hundreds of MB
ROWS_TOGETHER = 64


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
    param: str = ""  # the request's field that caused the error


def logit_positions(row: Row) -> range:
    """Return the positions whose logits are read: those after which log-probabilities are reported, and the last one."""
    end, scored = row.start + row.count, row.sequence.scored
    first = max(row.start, scored.start) if row.start < scored.stop else end - 1
    return range(min(first, end - 1), end)


def num_candidates(beam_width: int) -> int:
    """Return how many candidates each beam reports: enough to continue all beams even if each of them could end."""
    return 2 * beam_width


class Sampler:
    """Samples token ids: `suppressed_ids` (media markers, padding) never, and `eos_ids` not before `min_tokens`."""

    def __init__(self, suppressed_ids: abc.Sequence[int], eos_ids: abc.Sequence[int]) -> None:
        self._suppressed = torch.tensor(suppressed_ids, dtype=torch.long)
        self._eos = list(eos_ids)

    def read(self, rows: abc.Sequence[Row], positions: abc.Sequence[range], logits: Tensor) -> list[Result]:
        """Read logits [W, V] of the model's dtype, of which `len(positions[i])` belong to row i. They are overwritten."""
        if len(logits) == len(rows) and all(map(_reads_greedy_token, rows)):
            return self._read_greedy(rows, logits)
        logits = logits.float()
        results = [Result(row) for row in rows]
        parts = logits.split(list(map(len, positions)))
        # a row's maximum is NaN if any of its logits is
        is_finite = logits.amax(-1).isfinite()
        sampling = [i for i, row in enumerate(rows) if row.samples and not row.sequence.targets]
        token_ids, is_permitted = self._choose([results[i] for i in sampling], [parts[i][-1] for i in sampling])
        for i, token_id, is_row_permitted in zip(sampling, token_ids.tolist(), is_permitted.tolist(), strict=True):
            results[i].token_id = token_id
            if not is_row_permitted:
                results[i].error, results[i].param = _refusal(rows[i].sequence)
        for result, is_part_finite in zip(results, is_finite.split(list(map(len, positions))), strict=True):
            if not bool(is_part_finite.all()):
                result.error, result.param = NOT_FINITE, ""
        _report_logprobs(results, positions, parts)
        _report_targets(results, positions, logits)
        return results

    def _read_greedy(self, rows: abc.Sequence[Row], logits: Tensor) -> list[Result]:
        token_ids, is_finite = self.greedy(logits)
        return [
            Result(row, token_id=token_id if row.samples else None, error="" if is_row_finite else NOT_FINITE)
            for row, token_id, is_row_finite in zip(rows, token_ids.tolist(), is_finite.tolist(), strict=True)
        ]

    def _choose(self, results: list[Result], logits: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Sample for each result, as `sample` does. Beams get candidates as well."""
        sequences = [result.row.sequence for result in results]
        for result, sequence, row in zip(results, sequences, logits, strict=True):
            if width := sequence.sampling.beam_width:
                logprobs = row.log_softmax(-1)
                self._keep_from_ending(logprobs, sequence)
                result.candidates = self.candidates(logprobs, num_candidates(width))
        return self.sample(torch.stack(logits), sequences) if logits else (torch.empty(0), torch.empty(0))

    def sample(self, logits: Tensor, sequences: abc.Sequence[Sequence]) -> tuple[Tensor, Tensor]:
        """Float32 logits [S, V], overwritten -> token ids [S], and whether each row permits a token; else its id is any.

        Nothing here makes the host wait for the device.
        """
        logits.index_fill_(1, self._suppressed_on(logits.device), -torch.inf)
        for row, sequence in zip(logits, sequences, strict=True):
            self._shape(row, sequence)
        token_ids = logits.argmax(-1)
        is_permitted = logits.gather(1, token_ids[:, None])[:, 0].isfinite()
        random_rows = [i for i, sequence in enumerate(sequences) if sequence.sampling.is_random]
        for truncate in (False, True):
            if rows := [i for i in random_rows if _is_truncated(sequences[i].sampling) == truncate]:
                uniform = [sequences[i].random.random() for i in rows]
                samplings = [sequences[i].sampling for i in rows]
                token_ids[rows] = draw(logits[rows], samplings, uniform, truncate=truncate)
        return token_ids, is_permitted

    def greedy(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [S, V], overwritten, of greedy sequences -> token ids [S], and whether each row is finite."""
        return greedy_argmax(logits, self._suppressed_on(logits.device))

    def _suppressed_on(self, device: torch.device) -> Tensor:
        if self._suppressed.device != device:
            self._suppressed = self._suppressed.to(device)
        return self._suppressed

    def candidates(self, logprobs: Tensor, count: int) -> list[tuple[int, float]]:
        """Return a beam's `count` best next tokens, or all there are, from its log-probabilities [V], best first."""
        allowed = logprobs.index_fill(0, self._suppressed_on(logprobs.device), -torch.inf)
        values, ids = allowed.topk(min(count, len(allowed)))
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        return [(token_id, logprob) for token_id, logprob in pairs if logprob > -torch.inf]

    def _shape(self, row: Tensor, sequence: Sequence) -> None:
        sampling = sequence.sampling
        if (matcher := sequence.matcher) is not None:
            ends = matcher.must_end(sampling.max_tokens - sequence.num_output_tokens, sampling.max_tokens)
            allowed = torch.from_numpy(matcher.allowed(len(row), ends=ends))
            row.masked_fill_(~allowed.to(row.device), -torch.inf)
        self._keep_from_ending(row, sequence)
        if sampling.logit_bias:
            ids = list(sampling.logit_bias)
            row[ids] += torch.tensor([sampling.logit_bias[i] for i in ids], device=row.device)
        if sampling.repetition_penalty != 1:
            _penalise_repetition(row, set(sequence.token_ids), sampling.repetition_penalty)
        if sampling.presence_penalty or sampling.frequency_penalty:
            _penalise_presence(row, Counter(sequence.token_ids[sequence.num_prompt_tokens :]), sampling)

    def _keep_from_ending(self, row: Tensor, sequence: Sequence) -> None:
        """Forbid the tokens that end the sequence, logits or log-probabilities [V], before `min_tokens`."""
        if sequence.num_output_tokens < sequence.sampling.min_tokens:
            row[self._eos + list(sequence.sampling.stop_token_ids)] = -torch.inf


def _reads_greedy_token(row: Row) -> bool:
    """Return whether at most the most likely token is read from the row's logits."""
    sequence = row.sequence
    reports_logprobs = sequence.targets or sequence.sampling.logprobs is not None or sequence.wants_prompt_logprobs
    return not reports_logprobs and (not row.samples or is_greedy(sequence))


def is_greedy(sequence: Sequence) -> bool:
    """Return whether the next token is the most likely one, with no change to the logits but suppressed ids."""
    sampling = sequence.sampling
    is_shaped = sequence.matcher is not None or sequence.num_output_tokens < sampling.min_tokens or sampling.logit_bias
    is_penalised = sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
    return not (sampling.is_random or sampling.beam_width or is_shaped or is_penalised)


def _refusal(sequence: Sequence) -> tuple[str, str]:
    """Return why no token may follow a sequence, and the field that is the cause."""
    if sequence.matcher is not None and (grammar := sequence.sampling.grammar) is not None:
        return f"{grammar.field}: {sequence.matcher.error or NOTHING_PERMITTED}", grammar.field
    return f"min_tokens: {NOTHING_PERMITTED}", "min_tokens"


def _penalise_repetition(row: Tensor, seen: set[int], penalty: float) -> None:
    """Divide positive logits of seen tokens, prompt included, and multiply negative ones (CTRL, Keskar et al., 2019)."""
    ids = torch.tensor(sorted(seen), device=row.device)
    values, penalty = row[ids], max(penalty, TINY)  # 0 times minus infinity would be NaN
    row[ids] = torch.where(values > 0, values / penalty, values * penalty).clamp(max=LARGEST)


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
    # the largest becomes 0 first: no temperature takes it to infinity
    scaled = (rows - rows.amax(-1, keepdim=True)) / _column([s.temperature for s in samplings], rows)
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
    """Return the first index of each row [V] at which the running sum exceeds that fraction of the row's sum.

    Of a row with NaN, it returns any index.
    """
    cumulative = weights.double().cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    targets = torch.tensor(uniform, dtype=torch.float64, device=weights.device)[:, None] * total
    index = torch.searchsorted(cumulative, targets, right=True)
    last = torch.searchsorted(cumulative, total)  # rounding may take a target past the last token with a weight
    return torch.minimum(index, last).clamp(max=weights.shape[-1] - 1)[:, 0]


def _report_logprobs(results: list[Result], positions: abc.Sequence[range], parts: abc.Sequence[Tensor]) -> None:
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
    num_top = sequence.sampling.prompt_logprobs or 0
    reported: list[TokenLogprob] = []
    for part in logits[: len(following)].split(ROWS_TOGETHER):
        ids = following[len(reported) : len(reported) + len(part)]
        reported += token_logprobs(part.log_softmax(-1), ids, [num_top] * len(ids))
    return reported


def _report_targets(results: list[Result], positions: abc.Sequence[range], logits: Tensor) -> None:
    """Set the targets' log-probabilities, of many rows at once: many candidates are a step of many short rows."""
    starts = accumulate(map(len, positions), initial=0)
    targets = [
        (result, position, start + offset, result.row.sequence.targets[position])
        for result, start, span in zip(results, starts, positions, strict=False)
        for offset, position in enumerate(span)
        if position in result.row.sequence.targets and not result.error
    ]
    for first in range(0, len(targets), ROWS_TOGETHER):
        group = targets[first : first + ROWS_TOGETHER]
        logprobs = logits[[row for _, _, row, _ in group]].log_softmax(-1)
        rows = [row for row, (_, _, _, ids) in enumerate(group) for _ in ids]
        values = iter(logprobs[rows, [i for _, _, _, ids in group for i in ids]].tolist())
        for result, position, _, ids in group:
            result.target_logprobs[position] = [next(values) for _ in ids]


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
