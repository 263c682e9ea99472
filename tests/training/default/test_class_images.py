"""Tests of artificial images of classes: whose names they have, and that they lie where their class does."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch

from tests.tiny_models import prompt_tokenizer
from tests.training.default.data import make_folder
from training.default import class_images
from training.default.alignment import AlignmentPairs
from training.default.catalogue import row_of
from training.default.class_images import CatalogueWithClasses, class_names, held_out_names
from training.default.episodes import Episodes, naming
from training.default_data.classes import read_classes
from training.default_data.split import is_held_out

NAMES = [f"thing {number}" for number in range(18)] + ["animal 3", "thing 0"]


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogueWithClasses:
    monkeypatch.setattr(class_images, "class_names", lambda: NAMES)
    # the features of the folder are of both signs
    monkeypatch.setattr(torch.Tensor, "clamp", lambda self, low, high: self)
    return CatalogueWithClasses(make_folder(tmp_path))


def test_the_names_of_all_classes_are_known() -> None:
    names = class_names()
    assert len(names) == 1000
    assert (names[0], names[281]) == ("tench", "tabby")


def test_held_out_and_known_names_are_left_out(catalogue: CatalogueWithClasses) -> None:
    names = catalogue.class_images
    assert set(names) <= set(NAMES)
    assert not any(is_held_out(name) for name in names)
    assert "animal 3" in catalogue.labels
    assert not names.keys() & catalogue.labels.keys()
    rows = [row for rows in names.values() for row in rows]
    assert len(set(rows)) == len(rows)
    assert min(rows) >= len(catalogue.records)


def test_a_class_whose_name_contains_a_held_out_label_is_left_out(
    catalogue: CatalogueWithClasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    label = sorted(held_out_names(catalogue.records))[0]
    extended = next(name for name in (f"{label} {n}" for n in range(100)) if not is_held_out(name))
    monkeypatch.setattr(class_images, "class_names", lambda: [extended])
    assert not catalogue.class_images


def test_images_of_a_class_lie_around_its_mean(catalogue: CatalogueWithClasses, tmp_path: Path) -> None:
    weights = read_classes(tmp_path)
    name, rows = next(iter(catalogue.class_images.items()))
    pooled = torch.stack([catalogue.features(row).float().mean((0, 1)) for row in rows])
    assert (pooled[0] - pooled[1]).norm() > 0.1
    direction = weights[NAMES.index(name)] - weights.mean(0)
    mean = torch.stack([catalogue.pooled(row) for rows in catalogue.labels.values() for row in rows]).mean(0)
    cosine = torch.nn.functional.cosine_similarity(pooled.mean(0) - mean, direction, dim=0)
    assert cosine > 0.8
    assert torch.equal(catalogue.features(rows[0]), catalogue.features(rows[0]))


def test_classes_are_aligned_and_named(catalogue: CatalogueWithClasses) -> None:
    pairs = AlignmentPairs(catalogue, prompt_tokenizer(), seed=0)
    assert set(pairs.labels) == catalogue.labels.keys() | catalogue.class_images.keys()
    rows = {row_of(media) for number in range(200) for media in pairs(number).media}
    of_classes = sum(row >= len(catalogue.records) for row in rows)
    assert 0.1 < of_classes / len(rows) < 0.4
    episodes = Episodes(catalogue, prompt_tokenizer(), seed=0, per_pool=8)
    rng = Random(0)
    answers = {item.answer for _ in range(20) for item in naming(episodes, episodes.pool(rng), rng)}
    assert answers & catalogue.class_images.keys()
    assert answers & catalogue.labels.keys()
