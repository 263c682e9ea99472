"""Tests of the linear discriminants, which separate labels and classes but not a label's images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ConfigError
from training.default.discriminants import (
    KIN_LENGTH,
    LENGTH,
    Discriminants,
    compute_discriminants,
    random_domain,
    with_kin,
)

WIDTH, DIM = 24, 6
CLASSES = F.pad(torch.randn(30, DIM, generator=torch.Generator().manual_seed(9)), (0, WIDTH - DIM))


def label_features(num_labels: int, per_label: int, seed: int) -> list[Tensor]:
    """Return features of each label's images [n, WIDTH], not centred at zero.

    Labels differ in the first DIM coordinates; the images of a label differ, more strongly, in the others.
    """
    noise = torch.Generator().manual_seed(seed)
    features = []
    for _ in range(num_labels):
        images = torch.randn(per_label, WIDTH, generator=noise) * torch.cat(
            [torch.full((DIM,), 0.3), torch.full((WIDTH - DIM,), 1.5)]
        )
        features.append(5.0 + images + F.pad(torch.randn(DIM, generator=noise), (0, WIDTH - DIM)))
    return features


@pytest.fixture(scope="module")
def fitted() -> Discriminants:
    return compute_discriminants(label_features(100, 20, 0), CLASSES, DIM)


def nearest_accuracy(images: list[Tensor]) -> float:
    """Return the share of labels whose second image is most similar to their own first image."""
    first, second = (F.normalize(torch.stack([label[i] for label in images]), dim=-1) for i in (0, 1))
    return float(((second @ first.T).argmax(-1) == torch.arange(len(images))).float().mean())


def test_new_labels_are_separated_better_than_by_their_features(fitted: Discriminants) -> None:
    new_labels = label_features(50, 2, 1)
    mean = torch.cat(new_labels).mean(0)
    assert nearest_accuracy([images - mean for images in new_labels]) < 0.2
    assert nearest_accuracy([fitted(images) for images in new_labels]) > 0.6


def test_directions_in_which_only_classes_differ_are_kept() -> None:
    """All drawings agree in the coordinate, but the encoder's classes differ in it."""
    coordinate = WIDTH // 2
    known = F.pad(torch.randn(30, 1, generator=torch.Generator().manual_seed(9)), (coordinate, WIDTH - coordinate - 1))
    weights = []
    for classes in (CLASSES, known):
        directions = compute_discriminants(label_features(100, 20, 0), classes, DIM).directions
        weights.append(float(F.normalize(directions, dim=-1)[:, coordinate].norm()))
    assert weights[0] < 0.3
    assert weights[1] > 0.9


def test_the_projection_keeps_every_distance(fitted: Discriminants) -> None:
    images = torch.cat(label_features(4, 3, 2))
    projected = images @ fitted.projection(16).T
    torch.testing.assert_close(torch.cdist(projected, projected), torch.cdist(fitted(images), fitted(images)))


def test_discriminants_are_centred_and_have_the_specified_mean_length(fitted: Discriminants) -> None:
    values = fitted(torch.cat(label_features(100, 20, 0)))
    assert float(values.norm(dim=-1).mean()) == pytest.approx(LENGTH, rel=1e-3)
    assert float(values.mean(0).norm()) < 1e-3


def test_a_domain_rotates_the_discriminants_and_leaves_other_components(fitted: Discriminants) -> None:
    features, domain = torch.cat(label_features(4, 3, 2)), random_domain(DIM, 0.0, 0.0, 7)
    rotated = fitted.move_to_domain(features, domain, 1)
    torch.testing.assert_close(fitted(rotated), fitted(features) @ domain.rotation.T, atol=1e-3, rtol=1e-3)
    change = rotated - features
    torch.testing.assert_close(change @ fitted.directions.T @ fitted.inverse.T, change, atol=1e-3, rtol=1e-3)


def test_a_strange_domain_has_a_mean_and_adds_noise_to_each_image(fitted: Discriminants) -> None:
    image, domain = label_features(1, 1, 2)[0], random_domain(DIM, 1.0, 1.0, 7)
    rotated = fitted(image) @ domain.rotation.T
    scale = LENGTH / (LENGTH**2 + domain.noise**2) ** 0.5
    noises = [
        (fitted(fitted.move_to_domain(image, domain, seed)) - domain.offset) / scale - rotated for seed in range(3)
    ]
    assert 0.0 < float(domain.offset.norm()) <= LENGTH
    assert 0.0 < domain.noise <= LENGTH
    for noise in noises:
        assert float(noise.norm()) == pytest.approx(domain.noise, rel=1e-2)
    assert float((noises[0] - noises[1]).norm()) > 1e-2


def test_kin_is_discriminants_of_its_own_that_a_domain_turns_into_others(fitted: Discriminants) -> None:
    images = torch.cat(label_features(100, 20, 0))
    kin = 3 + torch.randn(len(images), 2, generator=torch.Generator().manual_seed(4))
    joint, features = with_kin(fitted, kin), torch.cat([images, kin], dim=-1)
    values = joint(features)
    torch.testing.assert_close(values[:, :DIM], fitted(images))
    assert float(values[:, DIM:].norm(dim=-1).mean()) == pytest.approx(KIN_LENGTH * LENGTH, rel=1e-3)
    torch.testing.assert_close(values[:, DIM:], values[0, DIM:] / (kin[0] - kin.mean(0)) * (kin - kin.mean(0)))
    domain = random_domain(DIM + 2, 0.0, 0.0, 7)
    turned = joint.move_to_domain(features, domain, 1)
    torch.testing.assert_close(joint(turned), values @ domain.rotation.T, atol=1e-3, rtol=1e-3)


def test_more_directions_than_the_features_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="25 discriminants were requested, but features of width 24 have at most 24"):
        compute_discriminants(label_features(3, 2, 0), CLASSES, 25)


@pytest.mark.parametrize("num_labels", [0, 1])
def test_images_of_fewer_than_two_labels_are_refused(num_labels: int) -> None:
    images = label_features(3, 2, 0)[:num_labels]
    with pytest.raises(ConfigError, match=f"need images of two labels or more to train on, not of {num_labels}"):
        compute_discriminants(images, CLASSES, DIM)
