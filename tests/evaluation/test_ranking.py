"""Tests that ranking by branches gives the scores of whole sequences, and that the intervals are Wilson's."""

from __future__ import annotations

import pytest
import torch

from evaluation.intervals import Share
from evaluation.ranking import Branch, PagedTokens, Ranker
from model.flamingo import Flamingo
from model.reference import log_probs
from tests.tiny_models import CONFIGS, Family, tiny_model

PREFIX = PagedTokens([5, 6, 7, 8, 9, 10], [-1, 0, 0, 1, 1, 1])
BRANCHES = [
    Branch(0, PagedTokens([11], [-1]), PagedTokens([12], [-1])),
    Branch(3, PagedTokens([11, 12], [2, 2]), PagedTokens([13, 14], [2, 2])),
    Branch(3, PagedTokens([11, 12], [2, 2]), PagedTokens([15], [2])),
    Branch(6, PagedTokens([11, 12], [0, 0]), PagedTokens([13, 14, 15], [0, 0, 0])),
]


def sequence_score(model: Flamingo, media: torch.Tensor, branch: Branch) -> float:
    ids = [*PREFIX.token_ids[: branch.prefix_length], *branch.query.token_ids, *branch.candidate.token_ids]
    pages = [*PREFIX.pages[: branch.prefix_length], *branch.query.pages, *branch.candidate.pages]
    rows = log_probs(model, ids, pages, model.fresh_media(media))
    first = len(ids) - len(branch.candidate.token_ids)
    return sum(float(rows[first + n - 1, token]) for n, token in enumerate(branch.candidate.token_ids))


@pytest.mark.parametrize("family", ["openflamingo", "flamingo"])
def test_a_branchs_score_is_its_whole_sequences_score(family: Family) -> None:
    model = tiny_model(CONFIGS[family])
    media = model.encode_media(torch.randn(3, 1, 3, 8, 8))
    with torch.inference_mode():
        scores = Ranker(model, model.fresh_media(media)).scores(PREFIX, BRANCHES)
    assert scores == pytest.approx([sequence_score(model, media, branch) for branch in BRANCHES], abs=1e-4)


def test_a_branch_without_a_prefix() -> None:
    model = tiny_model(CONFIGS["flamingo"])
    media = model.encode_media(torch.randn(1, 1, 3, 8, 8))
    branch = Branch(0, PagedTokens([11, 12], [0, 0]), PagedTokens([13], [0]))
    scores = Ranker(model, model.fresh_media(media)).scores(PagedTokens([], []), [branch])
    assert scores == pytest.approx([sequence_score(model, media, branch)], abs=1e-4)


def test_wilson_intervals() -> None:
    assert Share(8, 10).interval() == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Share(0, 5).interval() == pytest.approx((0.0, 0.4345), abs=1e-4)
    assert str(Share(1, 2)) == "0.500 [0.095, 0.905]"
