"""Fixtures for the default model's training: a catalogue of random features and discriminants fitted to it."""

from __future__ import annotations

import pytest
import torch

from tests.training.default.data import make_folder
from training.default.catalogue import Catalogue
from training.default.discriminants import Discriminants, compute_discriminants


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return Catalogue(make_folder(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def discriminants(catalogue: Catalogue) -> Discriminants:
    images = [torch.stack([catalogue.pooled(row) for row in rows]) for rows in catalogue.labels.values()]
    classes = torch.randn(20, images[0].shape[1], generator=torch.Generator().manual_seed(0))
    return compute_discriminants(images, classes, 8)
