"""Imagined features look like an encoder's: sparse, bounded, one class's nearer; nothing held out is named."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
import torch
import torch.nn.functional as F

from tests.tiny_models import prompt_tokenizer
from training.default.episodes import LIMITS, MAKERS, Episodes
from training.default.imagined import KINDS, NUM_IMAGES, Encoder, Imagined
from training.default_data.split import held_out

WIDTH = 256


@pytest.fixture(scope="module")
def imagined() -> Imagined:
    rng = torch.Generator().manual_seed(0)
    directions = torch.randn(1000, WIDTH, generator=rng)
    encoder = Encoder(torch.full((WIDTH,), -4.5), torch.full((WIDTH,), 3.5), directions)
    return Imagined(encoder, [f"thing {number}" for number in range(1000)])


def test_nothing_held_out_is_named(imagined: Imagined) -> None:
    assert 300 < len(imagined.labels) < 1000
    assert not any(map(held_out, [*imagined.labels, *imagined.categories]))
    assert set(imagined.categories) <= {kind for _, _, kind in KINDS}
    for label in list(imagined.labels)[:20]:
        assert {imagined.records[row].label for row in imagined.labels[label]} == {label}


def test_kinds_do_not_overlap() -> None:
    assert all(first <= last for first, last, _ in KINDS)
    assert all(before[1] < after[0] for before, after in pairwise(KINDS))


def test_features_are_sparse_bounded_and_the_same_by_row(imagined: Imagined) -> None:
    features = torch.stack([imagined.features(number * NUM_IMAGES) for number in range(20)]).float()
    assert features.shape == (20, 1, 49, WIDTH)
    assert float(features.min()) >= 0.0
    assert float(features.max()) <= 6.0
    assert 0.8 < float((features == 0).float().mean()) < 0.95
    assert torch.equal(imagined.features(5), imagined.features(5))
    assert not torch.equal(imagined.features(5), imagined.features(6))


def test_images_of_a_class_are_alike_but_not_the_same(imagined: Imagined) -> None:
    pooled = torch.stack(
        [imagined.features(number * NUM_IMAGES + n)[0].float().mean(0) for number in range(20) for n in range(4)]
    )
    alike = F.normalize(pooled - pooled.mean(0), dim=1)
    scores = (alike @ alike.T).view(20, 4, 20, 4)
    same = torch.stack([scores[n, :, n][~torch.eye(4, dtype=torch.bool)].mean() for n in range(20)]).mean()
    other = torch.stack([scores[n, :, (n + 1) % 20].mean() for n in range(20)]).mean()
    assert other < same < 0.9


def test_sequences_are_made_of_it_as_of_drawings(imagined: Imagined) -> None:
    episodes = Episodes(imagined, prompt_tokenizer(), seed=0, per_pool=8)
    for make, _ in MAKERS:
        made = make(episodes, episodes.pool(Random(1)), Random(1))
        assert 0 < len(made) <= LIMITS.max_media
        assert any(one.is_learned for one in made)
        assert not any(held_out(imagined.records[one.row].label) for one in made)
    assert episodes(3).tokens == episodes(3).tokens
