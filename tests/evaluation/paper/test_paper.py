"""Tests of docs/paper.md: it is what the finished runs give, and says what is missing and what is undecided."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluation.paper.claims import Claim, claims
from evaluation.paper.evidence import ALL_PREVIOUS, CLIPS, LAST, SEEDS, Evidence, read_evidence
from evaluation.paper.page import write_page
from evaluation.paper.pictures import draw_pictures
from training.ablations.ablation import BASE
from training.ablations.table import Runs
from training.few_shot.clips import CONDITIONS
from training.few_shot.images import SHOTS
from training.few_shot.motions import FAMILIES

DOCS = Path(__file__).resolve().parents[3] / "docs"
GATES = {"steps": [1, 2], "values": {"gated.0.attn_gate": [0.0, 0.1], "gated.3.attn_gate": [0.0, 0.3]}}


def digits(percent: int) -> str:
    return "1" * percent + "0" * (100 - percent)


def image_runs(shares: dict[int, tuple[int, int, int]]) -> dict[int, dict[str, Any]]:
    """Return runs of the three seeds with these percentages by shots."""
    return {
        seed: {"correct": {str(count): digits(shares[count][seed]) for count in SHOTS}, "gates": GATES}
        for seed in SEEDS
    }


def clip_runs(percent: Callable[[str, int], int]) -> dict[int, dict[str, Any]]:
    rows = {
        seed: {f"{condition}, 4 shots": digits(percent(condition, seed)) for condition in CONDITIONS} for seed in SEEDS
    }
    return {seed: {"correct": dict.fromkeys(FAMILIES, row), "gates": GATES} for seed, row in rows.items()}


@pytest.fixture
def evidence() -> Evidence:
    """Runs in which more shots help, except that the change from 4 to 32 is uncertain."""
    ablations = {
        BASE: {seed: {"correct": digits(60 + seed), "loss": 1.0, "progress": [], "gates": GATES} for seed in SEEDS},
        "no-gates": {seed: {"correct": digits(50 + seed), "loss": 1.2, "gates": {}} for seed in SEEDS},
    }
    last = dict.fromkeys(SHOTS, (70, 71, 72)) | {0: (25, 26, 24), 32: (65, 71, 78)}
    few_shot = {
        LAST: image_runs(last),
        ALL_PREVIOUS: image_runs(dict.fromkeys(SHOTS, (25, 27, 26))),
        CLIPS: clip_runs(lambda condition, seed: 90 + seed if condition.endswith("0 frames") else 50 + seed),
    }
    size = {"visual_tokens": 64, "page_bytes": 10, "first_token_seconds": 0.1, "decode_seconds": 0.01}
    cost = {name: size | {"decode_ratio": 1.0, "decode_quartiles": [0.99, 1.01]} for name in ("1 frames", "30 frames")}
    shots = {"0": digits(25), "4": digits(60), "8": digits(70), "16": digits(72), "32": digits(71)}
    speed = {"interval-4": {"ratio": 0.7, "quartiles": [0.6, 0.8]}}
    return replace(
        read_evidence(), ablations=Runs(ablations, SEEDS, {}), few_shot=few_shot, cost=cost, speed=speed, shots=shots
    )


def find(evidence: Evidence, text: str) -> Claim:
    (claim,) = [claim for claim in claims(evidence) if text in claim.text]
    return claim


def test_the_page_is_what_the_finished_runs_give() -> None:
    """After a new run, `python -m evaluation.paper` writes it again."""
    assert (DOCS / "paper.md").read_text(encoding="utf-8") == write_page(read_evidence())


def test_the_pages_pictures_exist() -> None:
    pictures = re.findall(r"\]\((paper/[\w.]+)\)", (DOCS / "paper.md").read_text(encoding="utf-8"))
    assert len(pictures) == 3
    assert all((DOCS / picture).is_file() for picture in pictures)


def test_equal_runs_give_equal_pictures(evidence: Evidence, tmp_path: Path) -> None:
    for folder in ("first", "second"):
        draw_pictures(evidence, tmp_path / folder)
    names = {file.name for file in (tmp_path / "first").iterdir()}
    assert names == {"curve.svg", "gates.svg", "clips.svg"}
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_without_any_run_everything_is_missing(tmp_path: Path) -> None:
    empty = read_evidence(tmp_path, tmp_path, tmp_path)
    assert {claim.sign for claim in claims(empty)} == {"missing"}
    page = write_page(empty)
    for run in ("base-0", "no-gates-2", "images-1", "images-all-previous-0", "clips-2", "training.ablations --speed"):
        assert run in page.partition("## Missing runs")[2].partition("\n## ")[0]
    draw_pictures(empty, tmp_path / "pictures")


def test_a_missing_run_is_named(evidence: Evidence) -> None:
    assert evidence.missing() == []
    assert "## Missing runs" not in write_page(evidence)
    lacking = {seed: run for seed, run in evidence.few_shot[CLIPS].items() if seed != 1}
    page = write_page(replace(evidence, few_shot={**evidence.few_shot, CLIPS: lacking}))
    assert "- `python -m training.few_shot`: clips-1\n" in page


def test_an_interval_that_contains_zero_is_undecided(evidence: Evidence) -> None:
    claim = find(evidence, "32 shots instead of 4,")
    assert claim.sign == "undecided"
    assert claim.measured.startswith("+0.3 [-")
    assert f"| {claim.text} |" in write_page(evidence)
    assert "| **undecided** |" in write_page(evidence)


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        ("no tanh gates", "same"),
        ("Default model: 32 shots instead of 0", "same"),
        ("Default model: 32 shots instead of 8", "undecided"),
        ("4 shots: text reads all previous images", "same"),
        ("run `base`", "same"),
        ("Videos, order: 30 frames after", "same"),
        ("Videos, count: 30 frames instead of 1", "same"),
        ("Step time", "same"),
        ("Visual tokens", "same"),
        ("Time of a decode step", "same"),
    ],
)
def test_a_change_beyond_the_interval_has_the_papers_sign(evidence: Evidence, text: str, sign: str) -> None:
    assert find(evidence, text).sign == sign


def test_a_change_against_the_paper_is_another_sign(evidence: Evidence) -> None:
    runs = {**evidence.ablations.results}
    runs["no-gates"] = {seed: {"correct": digits(80 + seed), "loss": 1.2, "gates": {}} for seed in SEEDS}
    changed = replace(evidence, ablations=Runs(runs, SEEDS, {}), cost={**evidence.cost})
    assert find(changed, "no tanh gates").sign == "other"
    more = {**evidence.cost, "8 frames": {**evidence.cost["30 frames"], "visual_tokens": 512}}
    assert find(replace(evidence, cost=more), "Visual tokens").sign == "other"
    slower = {**evidence.cost, "8 frames": {**evidence.cost["30 frames"], "decode_quartiles": [1.0, 1.3]}}
    assert find(replace(evidence, cost=slower), "Time of a decode step").sign == "undecided"
