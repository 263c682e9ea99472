"""The likeness against its definition, computed image by image, and the file in which it is stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from model.config import ConfigError
from model.likeness import (
    FAMILIAR,
    FIRST_SHARES,
    LIKENESS,
    MATRICES,
    SHARES,
    ClassLikeness,
    load_likeness,
    to_tensors,
    unit,
)

WIDTH, NUM_DISCRIMINANTS, NUM_CLASSES, NUM_NODES, NUM_FAMILIAR = 12, 5, 7, 9, 4
RNG = np.random.default_rng(3)


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float16).astype(np.float32)


@pytest.fixture
def likeness() -> ClassLikeness:
    return ClassLikeness(
        mean=random(WIDTH),
        directions=random(NUM_DISCRIMINANTS, WIDTH),
        weight=random(NUM_CLASSES, WIDTH),
        bias=random(NUM_CLASSES),
        ancestors=(RNG.random((NUM_NODES, NUM_CLASSES)) < 0.4).astype(np.float32),
        familiar=np.linalg.qr(random(WIDTH, NUM_FAMILIAR))[0].T.astype(np.float16).astype(np.float32),
        shares=np.array([1.0, 0.5, 0.25, 2.5], np.float32),
    )


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def test_similarities_are_those_of_discriminants_classes_and_ancestors(likeness: ClassLikeness) -> None:
    images = np.abs(random(2, WIDTH))
    parts: dict[str, list[np.ndarray]] = {"discriminants": [], "classes": [], "ancestors": []}
    for image in images:
        parts["discriminants"].append(likeness.directions @ (image - likeness.mean))
        centred = likeness.weight - likeness.weight.mean(0)
        parts["classes"].append(centred @ (image / np.linalg.norm(image)))
        logits = likeness.weight @ image + likeness.bias
        probabilities = np.exp(logits) / np.exp(logits).sum()
        nodes = [
            np.sqrt(probabilities[below > 0].sum()) - np.sqrt(below.sum() / NUM_CLASSES) for below in likeness.ancestors
        ]
        parts["ancestors"].append(np.array(nodes))
    of_ancestors = 0.25 + (2.5 - 0.25) * likeness.strangeness(images)
    lengths = np.sqrt(1 + 0.5 + of_ancestors)
    shares = np.array([1, 0.5, np.sqrt(of_ancestors.prod())]) / lengths.prod()
    first, second = likeness(images)
    assert first @ second == pytest.approx(shares @ [similarity(*part) for part in parts.values()], abs=1e-5)
    assert first @ first == pytest.approx(1, abs=1e-5)


def test_an_image_is_as_strange_as_it_differs_in_directions_that_are_not_familiar(likeness: ClassLikeness) -> None:
    inside = likeness.familiar[0]
    outside = np.linalg.svd(likeness.familiar)[2][-1].astype(np.float32)
    images = likeness.mean + np.stack([3 * inside, 3 * outside, inside + outside, 2 * inside + outside])
    assert likeness.strangeness(images) == pytest.approx([0, 1, 0.5, 1 / (1 + 4**4)], abs=1e-2)


def test_a_folder_has_the_likeness_that_was_stored(likeness: ClassLikeness, tmp_path: Path) -> None:
    matrices = {name: np.asfortranarray(getattr(likeness, name)) for name in (*MATRICES, FAMILIAR)}
    tensors = to_tensors(np.asfortranarray(likeness.ancestors), likeness.shares, **matrices)
    save_file(tensors, tmp_path / LIKENESS)
    images = np.abs(random(4, WIDTH))
    assert load_likeness(tmp_path)(images) == pytest.approx(likeness(images))
    del tensors[SHARES], tensors[FAMILIAR]
    save_file(tensors, tmp_path / LIKENESS)
    first = replace(likeness, shares=np.array(FIRST_SHARES, np.float32))
    assert load_likeness(tmp_path)(images) == pytest.approx(first(images), abs=1e-6)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"weight": None}, "has no tensor 'weight'"),
        ({"ancestors": None}, "has no tensor 'ancestors'"),
        ({"ancestors": np.zeros(4, np.uint8)}, "cannot be read as a likeness: axis 1"),
        ({"mean": random(1)}, rf"mean has shape \[1\], expected \[{WIDTH}\]"),
        ({"bias": random(NUM_CLASSES - 1)}, r"weight has shape \[7, 12\], expected \[6, 12\]"),
        ({"directions": random(2, 5)}, r"directions has shape \[2, 5\], expected \[2, 12\]"),
        ({FAMILIAR: random(3, 4)}, r"familiar has shape \[3, 4\], expected \[3, 12\]"),
        ({SHARES: random(3)}, r"shares has shape \[3\], expected \[4\]"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    damage: dict[str, np.ndarray | None], message: str, likeness: ClassLikeness, tmp_path: Path
) -> None:
    matrices = {name: getattr(likeness, name) for name in (*MATRICES, FAMILIAR)}
    tensors = to_tensors(likeness.ancestors, likeness.shares, **matrices) | damage
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / LIKENESS)
    with pytest.raises(ConfigError, match=rf"likeness\.safetensors .*{message}"):
        load_likeness(tmp_path, WIDTH)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / LIKENESS).write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match=r"likeness\.safetensors cannot be read as a likeness: "):
        load_likeness(tmp_path)


def test_a_model_without_a_classifier_compares_features(tmp_path: Path) -> None:
    assert load_likeness(tmp_path) is unit
    assert unit(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)).tolist() == [
        [pytest.approx(0.6), pytest.approx(0.8)],
        [0, 0],
    ]
