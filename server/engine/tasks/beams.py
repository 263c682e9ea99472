"""Beam search (the paper's decoding: width 3, appendix C.3): a step of a request is a step of all of its beams.

Beams are ordinary sequences that share blocks and media. Each waits, nothing left to compute, until all have reported
their candidates; then the best continue, and a beam that ends competes by its mean-like score with those that ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from server.engine.sequence import Sequence
from server.wire import Sampling

Candidates = list[tuple[int, float]]  # (token id, log-probability), best first


class Move(NamedTuple):
    """A beam that continues: `parent` with one more token."""

    parent: Sequence
    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """An answer that has ended: its score, and its tokens with their log-probabilities."""

    score: float
    token_ids: list[int]
    logprobs: list[float]
    ended_by_eos: bool


class BeamSearch:
    """The beams of one request. A score is the sum of log-probabilities over length ** length_penalty."""

    def __init__(self, first: Sequence, eos_ids: frozenset[int]) -> None:
        self.sampling: Sampling = first.sampling
        self.width = first.sampling.beam_width
        self._stop_ids = frozenset(first.sampling.stop_token_ids)
        if not first.sampling.ignore_eos:
            self._stop_ids |= eos_ids
        self.live = [first]
        self.ended: list[Hypothesis] = []
        self._reported: dict[Sequence, Candidates] = {}

    @property
    def num_candidates(self) -> int:
        """Enough that the beams can continue even if each of them could end."""
        return 2 * self.width

    def report(self, sequence: Sequence, candidates: Candidates) -> bool:
        """Note a beam's candidates; True when no beam is missing."""
        self._reported[sequence] = candidates
        return len(self._reported) == len(self.live)

    def advance(self) -> list[Move]:
        """The beams' next tokens, best first; empty when the search is over."""
        ranked = sorted(
            (
                (sum(parent.logprobs) + logprob, Move(parent, token_id, logprob))
                for parent, candidates in self._reported.items()
                for token_id, logprob in candidates
            ),
            key=lambda scored: -scored[0],
        )[: self.num_candidates]
        self._reported.clear()
        moves: list[tuple[float, Move]] = []
        for rank, (total, move) in enumerate(ranked):
            if move.token_id in self._stop_ids:
                if rank < self.width:
                    self._end(move, total, by_eos=True)
            elif len(moves) < self.width:
                moves.append((total, move))
        length = self.live[0].num_output_tokens + 1
        if length >= self.sampling.max_tokens:
            for total, move in moves:
                self._end(move, total, by_eos=False)
            return []
        return [] if self._is_over(moves[0][0], length) else [move for _, move in moves]

    def best(self, count: int) -> list[Hypothesis]:
        return self.ended[:count]

    def _end(self, move: Move, total: float, *, by_eos: bool) -> None:
        tokens = [*move.parent.token_ids[move.parent.num_prompt_tokens :], move.token_id]
        score = total / len(tokens) ** self.sampling.length_penalty
        self.ended.append(Hypothesis(score, tokens, [*move.parent.logprobs, move.logprob], by_eos))
        self.ended.sort(key=lambda hypothesis: -hypothesis.score)
        del self.ended[self.width :]

    def _is_over(self, best_live: float, length: int) -> bool:
        """Whether enough have ended and none alive can still beat the worst of them."""
        if len(self.ended) < self.width:
            return False
        return self.sampling.early_stopping or self.ended[-1].score >= best_live / length**self.sampling.length_penalty
