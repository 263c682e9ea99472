"""Ranking by branches gives what each whole sequence gives, and the intervals are Wilson's."""

from __future__ import annotations

import pytest
import torch

from evaluation.intervals import Share
from evaluation.ranking import Branch, Piece, Ranker
from model.flamingo import Flamingo
from model.reference import log_probs
from tests.tiny_models import CONFIGS, Family, tiny_model

PREFIX = Piece([5, 6, 7, 8, 9, 10], [-1, 0, 0, 1, 1, 1])
BRANCHES = [
    Branch(0, Piece([11], [-1]), Piece([12], [-1])),
    Branch(3, Piece([11, 12], [2, 2]), Piece([13, 14], [2, 2])),
    Branch(3, Piece([11, 12], [2, 2]), Piece([15], [2])),
    Branch(6, Piece([11, 12], [0, 0]), Piece([13, 14, 15], [0, 0, 0])),
]


def by_hand(model: Flamingo, media: torch.Tensor, branch: Branch) -> float:
    ids = [*PREFIX.token_ids[: branch.behind], *branch.query.token_ids, *branch.candidate.token_ids]
    pages = [*PREFIX.pages[: branch.behind], *branch.query.pages, *branch.candidate.pages]
    rows = log_probs(model, ids, pages, model.fresh_media(media))
    first = len(ids) - len(branch.candidate.token_ids)
    return sum(float(rows[first + n - 1, token]) for n, token in enumerate(branch.candidate.token_ids))


@pytest.mark.parametrize("family", ["openflamingo", "flamingo"])
def test_a_branch_scores_what_its_whole_sequence_scores(family: Family) -> None:
    model = tiny_model(CONFIGS[family])
    media = model.encode_media(torch.randn(3, 1, 3, 8, 8))
    with torch.inference_mode():
        scores = Ranker(model, model.fresh_media(media)).scores(PREFIX, BRANCHES)
    assert scores == pytest.approx([by_hand(model, media, branch) for branch in BRANCHES], abs=1e-4)


def test_no_prefix_at_all() -> None:
    model = tiny_model(CONFIGS["flamingo"])
    media = model.encode_media(torch.randn(1, 1, 3, 8, 8))
    branch = Branch(0, Piece([11, 12], [0, 0]), Piece([13], [0]))
    scores = Ranker(model, model.fresh_media(media)).scores(Piece([], []), [branch])
    assert scores == pytest.approx([by_hand(model, media, branch)], abs=1e-4)


def test_wilson_s_interval() -> None:
    assert Share(8, 10).interval() == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Share(0, 5).interval() == pytest.approx((0.0, 0.4345), abs=1e-4)
    assert str(Share(1, 2)) == "0.500 [0.095, 0.905]"
