"""Answers a `Generate` by beam search (the paper's decoding: width 3, appendix C.3).

Beams are ordinary sequences that share blocks and media. Each waits until all have reported their candidates; then the best
candidates continue, and a beam that ends competes by its score with those that ended before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from server.engine.config import EngineConfig
from server.engine.device.sampler import Result, num_candidates
from server.engine.residents import Residents
from server.engine.sequence import QueueOrder, Sequence
from server.engine.tasks.answers import Answers
from server.engine.tasks.task import RequestError
from server.wire import FinishReason, Generate, Outbound, Token, TokenLogprob


class Move(NamedTuple):
    """A beam that continues: `parent` with one more token."""

    parent: Sequence
    logprob: TokenLogprob

    @property
    def token_id(self) -> int:
        return self.logprob.token_id


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """An answer that has ended: its score, and its tokens' log-probabilities."""

    score: float
    logprobs: list[TokenLogprob]
    is_stopped: bool  # by a stop token, not by max_tokens


class BeamAnswers(Answers):
    """Beams instead of independent answers; all events are sent at the end of the search.

    A score is the sum of log-probabilities divided by length ** length_penalty.

    Raises `RequestError` also if the beams need more blocks than the engine has.
    """

    def __init__(self, request: Generate, order: QueueOrder, residents: Residents, eos_ids: frozenset[int]) -> None:
        super().__init__(request, order, residents, eos_ids)
        _check_blocks(request, residents.config)
        self._sampling = request.sampling
        self._reported: dict[Sequence, Result] = {}
        self._ended: list[Hypothesis] = []  # the best, best first

    def end_answer(self, index: int) -> Iterable[Outbound]:
        """Do nothing: no answer was sent yet, and the search continues for the others."""
        return []

    def _unfinished_answers(self) -> Iterable[int]:
        return range(self._sampling.n)

    def _advance(self, result: Result) -> Iterable[Outbound]:
        """Note the candidates of one beam; after the last beam, all beams advance.

        A beam that waits for the others may be preempted. Then it is computed again, and reports twice or too late.
        """
        sequence = result.row.sequence
        if result.row.end == len(sequence.token_ids):
            self._reported[sequence] = result
        if len(self._reported) < len(self._live):
            return []
        if moves := self._next_moves():
            self._continue(moves)
            return []
        self.is_finished = True
        return self._best_answers()

    def _next_moves(self) -> list[Move]:
        """Return the beams' next tokens, best first; empty when the search is over."""
        width, max_tokens = self._sampling.beam_width, self._sampling.max_tokens
        ranked = sorted(
            (move for result in self._reported.values() for move in _moves(result)),
            key=lambda scored: -scored[0],
        )[: num_candidates(width)]
        self._reported.clear()
        moves: list[tuple[float, Move]] = []
        for rank, (total, move) in enumerate(ranked):
            if move.token_id in self._stop_ids:
                if rank < width:
                    self._end_beam(move, total, is_stopped=True)
            elif len(moves) < width:
                moves.append((total, move))
        length = self._live[0].num_output_tokens + 1
        if length >= max_tokens:
            for total, move in moves:
                self._end_beam(move, total, is_stopped=False)
            return []
        if not moves:
            return []  # each of the best candidates, as many as there are beams, ends a beam
        return [] if self._is_over(moves[0][0], length) else [move for _, move in moves]

    def _end_beam(self, move: Move, total: float, *, is_stopped: bool) -> None:
        logprobs = [*move.parent.logprobs, move.logprob]
        score = total / len(logprobs) ** self._sampling.length_penalty
        self._ended.append(Hypothesis(score, logprobs, is_stopped))
        self._ended.sort(key=lambda hypothesis: -hypothesis.score)
        del self._ended[self._sampling.beam_width :]

    def _is_over(self, best_total: float, length: int) -> bool:
        """Return whether enough beams have ended and no live one can still beat the worst of them."""
        if len(self._ended) < self._sampling.beam_width:
            return False
        best_score = best_total / length**self._sampling.length_penalty
        return self._sampling.early_stopping or self._ended[-1].score >= best_score

    def _continue(self, moves: list[Move]) -> None:
        """Append each move's token to its parent, or to a fork of it from its second move on."""
        parents = [move.parent for move in moves]
        for sequence in self._live.values():
            if sequence not in parents:
                self._residents.finish(sequence)  # before the forks, which may need its blocks
        beams: list[Sequence] = []
        for parent in parents:
            beams.append(self._fork(parent) if parent in beams else parent)
        for sequence, move in zip(beams, moves, strict=True):
            sequence.append(move.token_id)
            sequence.logprobs.append(move.logprob)
        self._live = dict(enumerate(beams))

    def _fork(self, parent: Sequence) -> Sequence:
        child = parent.fork(parent.index)
        if not self._residents.fork(parent, child):
            self._residents.queue(child)  # it is computed again when there are blocks
        return child

    def _best_answers(self) -> Iterable[Outbound]:
        for index, best in enumerate(self._ended[: self._sampling.n]):
            last = len(best.logprobs) - 1
            for position, logprob in enumerate(best.logprobs):
                reason: FinishReason = "stop" if best.is_stopped else "length"
                yield Token(
                    request_id=self.request_id,
                    index=index,
                    token_id=logprob.token_id,
                    logprob=logprob,
                    finish_reason=reason if position == last else None,
                )


def _moves(result: Result) -> Iterable[tuple[float, Move]]:
    """Return the moves of a beam, each with the sum of log-probabilities that it would give."""
    beam, top = result.row.sequence, result.logprob.top if result.logprob else []
    total = sum(token.logprob for token in beam.logprobs)
    for token_id, logprob in result.candidates:
        yield total + logprob, Move(beam, TokenLogprob(token_id, logprob, top))


def _check_blocks(request: Generate, config: EngineConfig) -> None:
    max_tokens, width = request.sampling.max_tokens, request.sampling.beam_width
    blocks_per_fork = -(-max_tokens // config.block_size) + 2
    num_blocks = request.prompt.num_blocks(config.block_size, max_tokens) + (width - 1) * blocks_per_fork
    if num_blocks > config.num_blocks:
        raise RequestError(f"{width} beams need {num_blocks} blocks, the engine has {config.num_blocks}")
