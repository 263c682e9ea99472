"""Tests that ranking by branches gives the scores of whole sequences, and that the intervals are Wilson's."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from evaluation.intervals import Share
from evaluation.ranking import Branch, PagedTokens, Ranker, concatenate
from model.config import AlonePositions
from model.flamingo import Flamingo
from model.prompt import ShotsAttend
from model.reference import log_probs
from tests.tiny_models import CONFIGS, Family, tiny_model, with_alone_positions

SHOTS = [PagedTokens([5, 6, 7], [0, 0, 0]), PagedTokens([8, 9, 10, 11], [1, 1, 1, 1]), PagedTokens([3, 4], [2, 2])]
BRANCHES = [
    Branch(0, PagedTokens([11], [-1]), PagedTokens([12], [-1])),
    Branch(1, PagedTokens([11, 12], [2, 2]), PagedTokens([13, 14], [2, 2])),
    Branch(2, PagedTokens([11, 12], [2, 2]), PagedTokens([15], [2])),
    Branch(3, PagedTokens([11, 12], [0, 0]), PagedTokens([13, 14, 15], [0, 0, 0])),
    Branch(3, PagedTokens([11, 12], [0, 0]), PagedTokens([13, 15, 15], [0, 0, 0])),
]


def sequence_score(model: Flamingo, media: torch.Tensor, branch: Branch, shots_attend: ShotsAttend) -> float:
    parts = [*SHOTS[: branch.num_shots], concatenate([branch.query, branch.candidate])]
    sequence = concatenate(parts)
    starts = [0, *accumulate((len(part.token_ids) for part in parts[:-1]), initial=0)]
    spans = starts if shots_attend == "alone" and branch.num_shots else ()
    rows = log_probs(model, sequence.token_ids, sequence.pages, model.fresh_media(media), spans)
    first = len(sequence.token_ids) - len(branch.candidate.token_ids)
    return sum(float(rows[first + n - 1, token]) for n, token in enumerate(branch.candidate.token_ids))


@pytest.mark.parametrize(
    ("shots_attend", "alone_positions"), [("previous", "restart"), ("alone", "restart"), ("alone", "in_a_row")]
)
@pytest.mark.parametrize("family", ["openflamingo", "flamingo", "idefics"])
def test_a_branchs_score_is_its_whole_sequences_score(
    family: Family, shots_attend: ShotsAttend, alone_positions: AlonePositions
) -> None:
    model = tiny_model(with_alone_positions(CONFIGS[family], alone_positions))
    media = model.encode_media(torch.randn(3, 1, 3, 8, 8))
    with torch.inference_mode():
        scores = Ranker(model, model.fresh_media(media), shots_attend).scores(SHOTS, BRANCHES)
    expected = [sequence_score(model, media, branch, shots_attend) for branch in BRANCHES]
    assert scores == pytest.approx(expected, abs=1e-4)
    # another model's positions can be replaced by these
    other = tiny_model(CONFIGS[family])
    with torch.inference_mode():
        replaced = Ranker(other, other.fresh_media(media), shots_attend, alone_positions).scores(SHOTS, BRANCHES)
    assert replaced == pytest.approx(scores, abs=1e-5)


def test_the_order_of_shots_that_attend_alone_does_not_matter() -> None:
    model = tiny_model(CONFIGS["flamingo"])
    pages = model.fresh_media(model.encode_media(torch.randn(3, 1, 3, 8, 8)))
    alone, previous = Ranker(model, pages, "alone"), Ranker(model, pages)
    branches = BRANCHES[-2:]
    assert alone.scores(SHOTS, branches) == pytest.approx(alone.scores(SHOTS[::-1], branches), abs=1e-4)
    assert previous.scores(SHOTS, branches) != pytest.approx(previous.scores(SHOTS[::-1], branches), abs=1e-3)
    in_a_row = Ranker(model, pages, "alone", "in_a_row")
    assert in_a_row.scores(SHOTS, branches) != pytest.approx(in_a_row.scores(SHOTS[::-1], branches), abs=1e-3)


def test_a_branch_without_shots() -> None:
    model = tiny_model(CONFIGS["flamingo"])
    media = model.encode_media(torch.randn(1, 1, 3, 8, 8))
    branch = Branch(0, PagedTokens([11, 12], [0, 0]), PagedTokens([13], [0]))
    scores = Ranker(model, model.fresh_media(media)).scores([], [branch])
    assert scores == pytest.approx([sequence_score(model, media, branch, "previous")], abs=1e-4)


def test_wilson_intervals() -> None:
    assert Share(8, 10).interval() == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Share(0, 5).interval() == pytest.approx((0.0, 0.4345), abs=1e-4)
    assert str(Share(1, 2)) == "0.500 [0.095, 0.905]"
