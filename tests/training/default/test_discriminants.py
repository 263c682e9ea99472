"""Directions that tell things apart: in which things or classes differ, and pictures of a thing do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ConfigError
from training.default.discriminants import LENGTH, Discriminants, discriminants, random_domain

WIDTH, DIM = 24, 6
CLASSES = F.pad(torch.randn(30, DIM, generator=torch.Generator().manual_seed(9)), (0, WIDTH - DIM))


def things(count: int, per_thing: int, seed: int) -> list[Tensor]:
    """Things differ in the first coordinates, and their pictures, more, in the others; none of them is at zero."""
    noise = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        pictures = torch.randn(per_thing, WIDTH, generator=noise) * torch.cat(
            [torch.full((DIM,), 0.3), torch.full((WIDTH - DIM,), 1.5)]
        )
        made.append(5.0 + pictures + F.pad(torch.randn(DIM, generator=noise), (0, WIDTH - DIM)))
    return made


@pytest.fixture(scope="module")
def found() -> Discriminants:
    return discriminants(things(100, 20, 0), CLASSES, DIM)


def nearest(pictures: list[Tensor]) -> float:
    """How often a thing's second picture is most like its first."""
    first, second = (F.normalize(torch.stack([one[i] for one in pictures]), dim=-1) for i in (0, 1))
    return float(((second @ first.T).argmax(-1) == torch.arange(len(pictures))).float().mean())


def test_other_things_are_told_apart_better_than_by_their_features(found: Discriminants) -> None:
    unseen = things(50, 2, 1)
    mean = torch.cat(unseen).mean(0)
    assert nearest([one - mean for one in unseen]) < 0.2
    assert nearest([found(one) for one in unseen]) > 0.6


def test_what_classes_differ_in_is_kept_though_no_thing_does() -> None:
    """A coordinate in which all drawings are alike, and photographs of the encoder's classes are not."""
    coordinate = WIDTH // 2
    known = F.pad(torch.randn(30, 1, generator=torch.Generator().manual_seed(9)), (coordinate, WIDTH - coordinate - 1))
    kept = [discriminants(things(100, 20, 0), classes, DIM).directions for classes in (CLASSES, known)]
    of_it = [float(F.normalize(one, dim=-1)[:, coordinate].norm()) for one in kept]
    assert of_it[0] < 0.3
    assert of_it[1] > 0.9


def test_spread_keeps_every_distance(found: Discriminants) -> None:
    pictures = torch.cat(things(4, 3, 2))
    spread = pictures @ found.spread(16).T
    torch.testing.assert_close(torch.cdist(spread, spread), torch.cdist(found(pictures), found(pictures)))


def test_pictures_are_as_long_as_they_should_be_and_lie_around_zero(found: Discriminants) -> None:
    seen = found(torch.cat(things(100, 20, 0)))
    assert float(seen.norm(dim=-1).mean()) == pytest.approx(LENGTH, rel=1e-3)
    assert float(seen.mean(0).norm()) < 1e-3


def test_a_domain_turns_the_discriminants_and_leaves_the_rest(found: Discriminants) -> None:
    features, domain = torch.cat(things(4, 3, 2)), random_domain(DIM, 0.0, 0.0, 7)
    turned = found.moved(features, domain, 1)
    torch.testing.assert_close(found(turned), found(features) @ domain.rotation.T, atol=1e-3, rtol=1e-3)
    moved = turned - features
    torch.testing.assert_close(moved @ found.directions.T @ found.inverse.T, moved, atol=1e-3, rtol=1e-3)


def test_a_strange_domain_has_a_mean_and_each_picture_something_of_its_own(found: Discriminants) -> None:
    picture, domain = things(1, 1, 2)[0], random_domain(DIM, 1.0, 1.0, 7)
    around = found(picture) @ domain.rotation.T
    shrunk = LENGTH / (LENGTH**2 + domain.noise**2) ** 0.5
    own = [(found(found.moved(picture, domain, seed)) - domain.offset) / shrunk - around for seed in range(3)]
    assert 0.0 < float(domain.offset.norm()) <= LENGTH
    assert 0.0 < domain.noise <= LENGTH
    for one in own:
        assert float(one.norm()) == pytest.approx(domain.noise, rel=1e-2)
    assert float((own[0] - own[1]).norm()) > 1e-2


def test_more_directions_than_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="25 discriminants were asked for, of features of 24 numbers"):
        discriminants(things(3, 2, 0), CLASSES, 25)
