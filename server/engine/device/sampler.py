"""Turns a step's logits into the result of each row: a token, the requested log-probabilities, or an error.

Each row's token is chosen by its own parameters, history and random number, which comes from its sequence's generator: a
seed gives the same tokens whatever else is in the batch. Log-probabilities are of the model's own distribution, before any
of the parameters. The last logits of each row are read even if nothing is sampled from them, to check that they are
finite: other sequences can share what a row wrote into the caches only after that.

Whatever the logits and the parameters are, an id is in the vocabulary, and a row without a permitted token fails alone.

A row with proposed tokens is that of a greedy sequence. It has a result for each of them that is the most likely token, up
to the first that is not, and for the token that follows them.
"""

from __future__ import annotations

from collections import abc, defaultdict
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor

from kernels.rows import greedy_argmax, greedy_argmax_reference
from server.engine.device.choice import Choice, ids_that_end
from server.engine.device.transfers import Downloads, Uploads, upload
from server.engine.plan import Row
from server.engine.sequence import Sequence
from server.grammar.refusals import sentence
from server.wire import TokenLogprob

NOT_FINITE = "the model's output is not finite"
NOTHING_PERMITTED = "with the other options, no next token is permitted"
# rows of log-probabilities that are computed at once: a step of prompt tokens times a vocabulary takes hundreds of MB
ROWS_TOGETHER = 64


@dataclass(slots=True)
class Result:
    """A result of a row: a token, log-probabilities, or only K/V; or the `error` that fails its sequence.

    The token of result `number` follows that many proposed tokens.
    """

    row: Row
    number: int = 0
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
    is_proposed: bool = False  # the token is the one that was proposed
    num_rejected: int = 0  # proposed tokens that the row's last result refutes


def logit_positions(row: Row) -> range:
    """Return the positions whose logits are read: those after which something is reported or sampled, and the last one."""
    last, scored = row.start + row.count - 1, row.sequence.scored
    first = max(row.start, scored.start) if row.start < scored.stop else last
    return range(min(first, last), row.end)


def num_candidates(beam_width: int) -> int:
    """Return how many candidates each beam reports: enough to continue all beams even if each of them could end."""
    return 2 * beam_width


@dataclass(frozen=True, slots=True)
class Reading:
    """The results of rows, on their way from the device, where their tokens stay as well, in the order of the rows."""

    by_row: list[list[Result]]
    to_host: Downloads
    token_ids: Tensor  # of the results for which one is chosen

    def results(self) -> list[Result]:
        """Wait for the device, once, and return the results."""
        self.to_host.finish()
        return list(chain.from_iterable(map(_verified, self.by_row)))


@dataclass(slots=True)
class StepLogits:
    """A step's logits [W, V] in float32. Result i has those after the tokens at `positions[i]`, from row `starts[i]` on."""

    logits: Tensor
    results: list[Result]
    positions: abc.Sequence[range]
    starts: list[int]
    to_device: Uploads
    to_host: Downloads
    sampled: list[int]  # results for which a token is chosen
    token_ids: Tensor  # of these results, once they are chosen

    @classmethod
    def of(cls, results: list[Result], positions: abc.Sequence[range], logits: Tensor) -> StepLogits:
        logits, starts = logits.float(), list(accumulate(map(len, positions), initial=0))
        rows, copies = [result.row for result in results], (Uploads(logits.device), Downloads())
        sampled = [i for i, row in enumerate(rows) if row.samples and not row.sequence.targets]
        return cls(logits, results, positions, starts, *copies, sampled, token_ids=logits.new_empty(0))

    def last(self, index: int) -> int:
        """Return the row of a result's last logits."""
        return self.starts[index + 1] - 1

    def take(self, numbers: abc.Sequence[int], on_device: Tensor) -> Tensor:
        """Return the logits with these numbers; consecutive ones are a view."""
        first, count = numbers[0], len(numbers)
        if numbers[-1] - first == count - 1 and list(numbers) == list(range(first, first + count)):
            return self.logits[first : first + count]
        return self.logits[on_device]


class Sampler:
    """Samples token ids: `suppressed_ids` (media markers, padding) never, and `eos_ids` not before `min_tokens`."""

    def __init__(self, suppressed_ids: abc.Sequence[int], eos_ids: abc.Sequence[int]) -> None:
        self._suppressed = torch.tensor(suppressed_ids, dtype=torch.long)
        self._eos = list(eos_ids)

    def read(
        self,
        rows: abc.Sequence[Row],
        positions: abc.Sequence[range],
        logits: Tensor,
        greedy: abc.Sequence[Tensor] = (),
    ) -> Reading:
        """Begin to read logits [W, V] of the model's dtype, of which `len(positions[i])` belong to row i.

        They are overwritten. `greedy`: the result of the method `greedy` for these logits, if it was called.
        """
        by_row = [[Result(row, number) for number in range(1 + len(row.proposed))] for row in rows]
        results = list(chain.from_iterable(by_row))
        if len(logits) == len(results) and all(map(_reads_greedy_token, rows)):
            token_ids, is_finite = greedy or self.greedy(logits)
            to_host = Downloads()
            to_host.add([token_ids, is_finite], _note_greedy, results)
        else:
            step = StepLogits.of(results, _own_positions(results, positions), logits)
            self._read_all(step)
            token_ids, to_host = step.token_ids, step.to_host
        to_host.begin()
        return Reading(by_row, to_host, token_ids)

    def _read_all(self, step: StepLogits) -> None:
        self._choose(step)
        # a row's maximum is NaN if any of its logits is; the logits themselves need not stay until the results are there
        step.to_host.add([step.logits.amax(-1).isfinite()], _note_broken, step.results, step.starts)
        _report_prompts(step)
        _report_sampled(step)
        _report_targets(step)
        step.to_device.run()

    def _choose(self, step: StepLogits) -> None:
        """Choose a token for each result that is sampled. Beams get candidates as well."""
        if not step.sampled:
            return
        self._continue_beams(step)
        sequences, numbers = [step.results[i].row.sequence for i in step.sampled], list(map(step.last, step.sampled))
        choice = Choice(sequences, self._eos, step.logits.shape[1])

        def choose(on_device: Tensor, *tables: Tensor) -> None:
            logits = step.logits.index_select(0, on_device)
            logits.index_fill_(1, self._suppressed_on(logits.device), -torch.inf)
            step.token_ids, is_permitted = choice.token_ids(logits, *tables)
            step.to_host.add([step.token_ids, is_permitted], _note_tokens, [step.results[i] for i in step.sampled])

        step.to_device.add([torch.tensor(numbers), *choice.tables], choose)

    def greedy(self, logits: Tensor, *, keeps_logits: bool = False) -> tuple[Tensor, Tensor]:
        """Logits [S, V] of greedy sequences, overwritten unless kept -> token ids [S], and whether each row is finite."""
        find = greedy_argmax_reference if keeps_logits else greedy_argmax
        return find(logits, self._suppressed_on(logits.device))

    def _suppressed_on(self, device: torch.device) -> Tensor:
        if self._suppressed.device != device:
            (self._suppressed,) = upload([self._suppressed], device)
        return self._suppressed

    def _continue_beams(self, step: StepLogits) -> None:
        by_width: dict[int, list[int]] = defaultdict(list)
        for i in step.sampled:
            if width := step.results[i].row.sequence.sampling.beam_width:
                by_width[width].append(i)
        for width, rows in by_width.items():
            self._continue_group(step, rows, num_candidates(width))

    def _continue_group(self, step: StepLogits, rows: list[int], count: int) -> None:
        results, numbers = [step.results[i] for i in rows], list(map(step.last, rows))
        endings = [ids_that_end(result.row.sequence, self._eos) for result in results]
        beams, ids = [beam for beam, ids in enumerate(endings) for _ in ids], [i for ids in endings for i in ids]

        def continue_beams(on_device: Tensor, forbidden: Tensor) -> None:
            logprobs = step.take(numbers, on_device).log_softmax(-1)
            logprobs[forbidden[0], forbidden[1]] = -torch.inf
            step.to_host.add(self.candidates(logprobs, count), _note_candidates, results)

        step.to_device.add([torch.tensor(numbers), torch.tensor([beams, ids], dtype=torch.int64)], continue_beams)

    def candidates(self, logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the values and ids of each beam's `count` best next tokens, or of all there are, best first.

        They come from its log-probabilities [R, V]; those that are not permitted have minus infinity.
        """
        allowed = logprobs.index_fill(1, self._suppressed_on(logprobs.device), -torch.inf)
        values, ids = allowed.topk(min(count, allowed.shape[1]))
        return values, ids


def _reads_greedy_token(row: Row) -> bool:
    """Return whether at most the most likely token is read from the row's logits."""
    sequence = row.sequence
    reports_logprobs = sequence.targets or sequence.sampling.logprobs is not None or sequence.wants_prompt_logprobs
    return not reports_logprobs and (not row.samples or sequence.is_greedy)


def _own_positions(results: abc.Sequence[Result], positions: abc.Sequence[range]) -> list[range]:
    """Return the positions of each row's own tokens for its first result, and of a proposed token for each later one."""
    firsts = iter(positions)
    ends = [result.row.start + result.row.count + result.number for result in results]
    return [range(end - 1 if r.number else next(firsts).start, end) for r, end in zip(results, ends, strict=True)]


def _verified(results: list[Result]) -> list[Result]:
    """Return a row's results up to the first whose token was not proposed; the later ones follow a wrong token.

    If one of these has failed, it is the only one.
    """
    if len(results) == 1:
        return results
    proposed = results[0].row.proposed
    for result in results:
        if result.error:
            results[0].error, results[0].param = result.error, result.param
            return results[:1]
        result.is_proposed = result.number < len(proposed) and result.token_id == proposed[result.number]
        if not result.is_proposed:
            result.num_rejected = len(proposed) - result.number
            return results[: result.number + 1]
    return results


def _refusal(sequence: Sequence) -> tuple[str, str]:
    """Return why no token may follow a sequence, and the field that is the cause."""
    if sequence.matcher is not None and (grammar := sequence.sampling.grammar) is not None:
        reason = sequence.matcher.error
        why = sentence(grammar.kind, reason, "followed") if reason else NOTHING_PERMITTED
        return f"{grammar.field}: {why}", grammar.field
    return f"min_tokens: {NOTHING_PERMITTED}", "min_tokens"


def _note_greedy(results: list[Result], token_ids: Tensor, is_finite: Tensor) -> None:
    for result, token_id, is_row_finite in zip(results, token_ids.tolist(), is_finite.tolist(), strict=True):
        result.token_id = token_id if result.row.samples else None
        result.error = "" if is_row_finite else NOT_FINITE


def _note_tokens(results: list[Result], token_ids: Tensor, is_permitted: Tensor) -> None:
    for result, token_id, is_row_permitted in zip(results, token_ids.tolist(), is_permitted.tolist(), strict=True):
        result.token_id = token_id
        if not is_row_permitted and not result.error:
            result.error, result.param = _refusal(result.row.sequence)


def _note_broken(results: list[Result], starts: list[int], is_finite: Tensor) -> None:
    are_finite = is_finite.tolist()
    for result, (first, end) in zip(results, pairwise(starts), strict=True):
        if not all(are_finite[first:end]):
            result.error, result.param = NOT_FINITE, ""


def _note_candidates(results: list[Result], values: Tensor, ids: Tensor) -> None:
    for result, row_ids, row_values in zip(results, ids.tolist(), values.tolist(), strict=True):
        pairs = zip(row_ids, row_values, strict=True)
        result.candidates = [(token_id, logprob) for token_id, logprob in pairs if logprob > -torch.inf]


def _report_sampled(step: StepLogits) -> None:
    """Report the log-probabilities of sampled tokens: rows with as many alternatives together."""
    by_number: dict[int, list[int]] = defaultdict(list)
    for index, i in enumerate(step.sampled):
        if (num_top := step.results[i].row.sequence.sampling.logprobs) is not None:
            by_number[num_top].append(index)
    for num_top, indices in by_number.items():
        for first in range(0, len(indices), ROWS_TOGETHER):
            _report_group(step, indices[first : first + ROWS_TOGETHER], num_top)


def _report_group(step: StepLogits, indices: list[int], num_top: int) -> None:
    rows = [step.sampled[index] for index in indices]
    numbers = list(map(step.last, rows))

    def report(on_device: Tensor, among_sampled: Tensor) -> None:
        logprobs = step.take(numbers, on_device).log_softmax(-1)
        token_ids = step.token_ids[among_sampled]
        step.to_host.add(token_logprobs(logprobs, token_ids, num_top), _note_logprobs, [step.results[i] for i in rows])

    step.to_device.add([torch.tensor(numbers), torch.tensor(indices)], report)


def _note_logprobs(results: list[Result], *values: Tensor) -> None:
    for result, logprob in zip(results, _logprobs(*values), strict=True):
        result.logprob = None if result.error else logprob


def _report_prompts(step: StepLogits) -> None:
    """Report the log-probabilities of the prompt tokens that follow each position; none follows the last one."""
    for result, positions, start in zip(step.results, step.positions, step.starts, strict=False):
        sequence = result.row.sequence
        if not sequence.wants_prompt_logprobs:
            continue
        following = [sequence.token_ids[at + 1] for at in positions if at + 1 < sequence.num_prompt_tokens]
        for first in range(0, len(following), ROWS_TOGETHER):
            _report_prompt(step, result, start + first, following[first : first + ROWS_TOGETHER])


def _report_prompt(step: StepLogits, result: Result, start: int, following: list[int]) -> None:
    num_top = result.row.sequence.sampling.prompt_logprobs or 0

    def report(token_ids: Tensor) -> None:
        logprobs = step.logits[start : start + len(following)].log_softmax(-1)
        step.to_host.add(token_logprobs(logprobs, token_ids, num_top), _note_prompt, result)

    step.to_device.add([torch.tensor(following)], report)


def _note_prompt(result: Result, *values: Tensor) -> None:
    if not result.error:
        result.prompt_logprobs += _logprobs(*values)


def _report_targets(step: StepLogits) -> None:
    """Report the targets' log-probabilities, of many rows at once: many candidates are a step of many short rows."""
    targets = [
        (result, position, start + offset)
        for result, start, span in zip(step.results, step.starts, step.positions, strict=False)
        for offset, position in enumerate(span)
        if position in result.row.sequence.targets
    ]
    for first in range(0, len(targets), ROWS_TOGETHER):
        _report_target_group(step, targets[first : first + ROWS_TOGETHER])


def _report_target_group(step: StepLogits, group: list[tuple[Result, int, int]]) -> None:
    ids_of_rows = [result.row.sequence.targets[position] for result, position, _ in group]
    rows, ids = [row for row, ids in enumerate(ids_of_rows) for _ in ids], [i for ids in ids_of_rows for i in ids]
    numbers = [number for _, _, number in group]

    def report(on_device: Tensor, index: Tensor) -> None:
        logprobs = step.take(numbers, on_device).log_softmax(-1)
        step.to_host.add([logprobs[index[0], index[1]]], _note_targets, group)

    step.to_device.add([torch.tensor(numbers), torch.tensor([rows, ids], dtype=torch.int64)], report)


def _note_targets(group: list[tuple[Result, int, int]], values: Tensor) -> None:
    remaining = iter(values.tolist())
    for result, position, _ in group:
        logprobs = [next(remaining) for _ in result.row.sequence.targets[position]]
        if not result.error:
            result.target_logprobs[position] = logprobs


def token_logprobs(logprobs: Tensor, token_ids: Tensor, num_top: int) -> list[Tensor]:
    """Log-probabilities [R, V] and the token of each row -> ids, values, and those of the `num_top` best ones [R, n]."""
    values, num_top = logprobs.gather(1, token_ids[:, None])[:, 0], min(num_top, logprobs.shape[1])
    top_values, top_ids = logprobs.topk(num_top) if num_top else (logprobs[:, :0], token_ids[:, None][:, :0])
    return [token_ids, values, top_ids, top_values]


def _logprobs(token_ids: Tensor, values: Tensor, top_ids: Tensor, top_values: Tensor) -> list[TokenLogprob]:
    tops = [list(zip(*pair, strict=True)) for pair in zip(top_ids.tolist(), top_values.tolist(), strict=True)]
    return [TokenLogprob(*of) for of in zip(token_ids.tolist(), values.tolist(), tops, strict=True)]
