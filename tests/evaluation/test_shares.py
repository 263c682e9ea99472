"""Tests of the choice of a likeness's shares."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from evaluation import held_out, prior, shares
from evaluation.held_out import Unreported
from model.likeness import LIKENESS, ClassLikeness, load_likeness, to_tensors
from tests.tiny_models import VISION
from tests.training.default.data import make_folder
from training.default.discriminants import compute_discriminants
from training.default_data.classes import read_classes
from training.default_data.features import feature_file
from training.default_data.records import read_records, write_records

NUM_CLASSES, NUM_NODES, NUM_DISCRIMINANTS = 20, 9, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng, width = make_folder(tmp_path_factory.mktemp("data")), np.random.default_rng(2), VISION.feature_dim
    matrices = {
        "mean": rng.normal(size=width).astype(np.float32),
        "directions": rng.normal(size=(NUM_DISCRIMINANTS, width)).astype(np.float32),
        "weight": rng.normal(size=(NUM_CLASSES, width)).astype(np.float32),
        "bias": rng.normal(size=NUM_CLASSES).astype(np.float32),
    }
    tensors = to_tensors(rng.random((NUM_NODES, NUM_CLASSES)) < 0.4, [1, 1, 1, 1], **matrices)
    save_file(tensors, folder / LIKENESS)
    return folder


def test_discriminants_are_fitted_to_labels_that_are_not_classified(folder: Path) -> None:
    unreported = Unreported.load(folder, folder)
    catalogue, likeness = unreported.catalogue, unreported.likeness
    labels = [rows for name, rows in catalogue.labels.items() if name not in unreported.categories["drawings"]]
    images = [torch.stack([catalogue.pooled(row) for row in rows]) for rows in labels]
    fitted = compute_discriminants(images, read_classes(folder), NUM_DISCRIMINANTS)
    served = load_likeness(folder)
    assert isinstance(likeness, ClassLikeness)
    assert isinstance(served, ClassLikeness)
    assert np.array_equal(likeness.directions, fitted.directions.numpy())
    assert np.array_equal(likeness.weight, served.weight)


def test_the_shares_with_the_highest_mean_over_the_domains_are_printed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(held_out, "LARGEST_EPISODE", 9)  # so that the photographs are too few
    options = ["--model", str(folder), "--data", str(folder), "--episodes", "2", "--ways", "3", "--per-label", "1"]
    monkeypatch.setattr(sys, "argv", ["shares", *options])
    shares.main()
    first, _, *rows, last = capsys.readouterr().out.splitlines()
    assert first == "| classes, ancestors: familiar, strange | photographs | drawings | kinds of drawings | mean |"
    means = {row.split(" | ")[0]: float(row.split(" | ")[-1].rstrip(" |")) for row in rows}
    choice = json.loads(last)
    assert means[f"| {', '.join(map(str, choice['best'][1:]))}"] == max(means.values())
    assert choice["mean"] == pytest.approx(max(means.values()), abs=1e-4)


def test_a_domain_counts_as_much_as_another_with_more_accuracies() -> None:
    assert shares.mean({"photographs": [1.0, 1.0, 1.0], "drawings": [0.5], "kinds of drawings": []}) == 0.75


@pytest.mark.parametrize("command", [prior, shares])
def test_data_without_drawings_end_the_command_with_one_line(
    command: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [record for record in read_records(folder) if record.domain == "photograph"]
    write_records(tmp_path, records)
    shape = (len(records), VISION.num_patches, VISION.feature_dim)
    np.save(feature_file(tmp_path, records), np.zeros(shape, np.float16))
    monkeypatch.setattr(sys, "argv", ["command", "--model", str(folder), "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^error: .+ has 0 labels of drawings to train on, 4 are needed$"):
        command.main()


def test_too_few_images_for_an_episode_end_the_command_with_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--model", str(folder), "--data", str(folder), "--episodes", "2", "--ways", "1000"]
    monkeypatch.setattr(sys, "argv", ["shares", *options])
    with pytest.raises(SystemExit, match=r"^error: .+ has too few images for episodes of 1000 labels$"):
        shares.main()
    monkeypatch.setattr(sys, "argv", ["prior", *options[:4], "--episodes", "1"])
    with pytest.raises(SystemExit, match=r"^2$"):  # an interval needs two
        prior.main()
