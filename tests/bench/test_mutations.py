"""The patches that break the code still apply, and the runner tells those that tests notice from those that survive."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.mutations.__main__ import main, score
from bench.mutations.patches import Patch, PatchError, check, read_patches
from bench.mutations.runner import Result, Run, RunError, judge, run_patches, tracked_files
from bench.table import ROOT

PATCHES = read_patches()
# they survived once
NAMED = {
    "weights_of_sets_are_ignored",
    "gradients_are_zeroed_between_sets",
    "windows_begin_with_the_page",
    "interval_of_the_9b_preset",
    "interval_of_the_80b_preset",
    "a_slot_is_released_while_it_is_read",
}
FILES = {
    "adder.py": "def add(a, b):\n    return a + b\n\n\ndef negate(a):\n    return -a\n",
    "test_adder.py": "from adder import add, negate\n\n\ndef test_add():\n    assert add(2, 3) == 5\n    negate(1)\n",
    "test_broken.py": "def test_broken():\n    assert False\n",
}


def patch(name: str, old: str, new: str, test: str = "test_adder.py") -> Patch:
    return Patch(name=name, breaks="It is wrong.", file="adder.py", old=old, new=new, tests=(test,))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("each", PATCHES, ids=[each.name for each in PATCHES])
def test_a_patch_applies(each: Patch) -> None:
    check([each], ROOT)
    assert each.breaks.endswith(".")


def test_the_list_covers_the_areas_and_what_survived_once() -> None:
    assert len(PATCHES) >= 60
    for folder in ("model", "kernels", "server/engine", "server/fewshot", "server/store", "training"):
        assert sum(each.file.startswith(f"{folder}/") for each in PATCHES) >= 10, folder
    assert {each.name for each in PATCHES} >= NAMED


def test_a_noticed_patch_is_killed_and_another_survives(root: Path) -> None:
    patches = [
        patch("wrong", "return a + b", "return a - b"),
        patch("unnoticed", "return -a", "return a"),
        patch("endless", "return a + b", "while True: pass"),
        patch("no_module", "def add", "def addition"),
    ]
    before = {name: (root / name).read_text() for name in FILES}
    results = run_patches(root, list(FILES), patches, jobs=2, timeout=20)
    assert [result.outcome for result in results] == ["killed", "survived", "killed", "broken"]
    assert results[0].by == "test_adder.py::test_add"
    assert results[2].by == "a timeout"
    assert {name: (root / name).read_text() for name in FILES} == before
    bar = score(results)
    assert (bar.value, bar.is_met) == (0.5, False)


def test_tests_that_fail_without_a_patch_judge_nothing(root: Path) -> None:
    with pytest.raises(RunError, match="without any patch, the tests fail with status 1"):
        run_patches(root, list(FILES), [patch("wrong", "a + b", "a - b", "test_broken.py")], jobs=1, timeout=60)


@pytest.mark.parametrize(
    ("status", "outcome"), [(0, "survived"), (1, "killed"), (2, "broken"), (4, "broken"), (5, "broken")]
)
def test_only_a_failed_test_kills(status: int, outcome: str) -> None:
    assert judge(Run(status, ""))[0] == outcome


@pytest.mark.parametrize("share", [0.94, 0.95])
def test_the_score_must_be_95_per_cent(share: float) -> None:
    killed = round(100 * share)
    outcomes = ["killed"] * killed + ["survived"] * (100 - killed)
    results = [Result(patch=patch("wrong", "a", "b"), outcome=each, by="", seconds=1.0) for each in outcomes]  # type: ignore[arg-type]
    assert score(results).is_met == (share >= 0.95)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old": "return a * b"}, "wrong: the old text occurs 0 times in adder.py, must occur once"),
        ({"old": "return"}, "wrong: the old text occurs 2 times in adder.py, must occur once"),
        ({"new": "return a + b"}, "wrong: the new text equals the old one"),
        ({"new": "return a +"}, "wrong: adder.py is no longer Python"),
        ({"file": "gone.py"}, "wrong: there is no file gone.py"),
        ({"tests": ("test_gone.py::test_add",)}, "wrong: there is no test test_gone.py::test_add"),
        ({"tests": ()}, "wrong: no test is named"),
    ],
)
def test_a_patch_that_has_rotted_is_named(root: Path, change: dict[str, object], message: str) -> None:
    values = {"name": "wrong", "breaks": "", "file": "adder.py", "old": "return a + b", "new": "return a - b"}
    rotten = Patch(**{**values, "tests": ("test_adder.py",), **change})  # type: ignore[arg-type]
    with pytest.raises(PatchError, match=message):
        check([rotten], root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wrong: {file: a.py, old: a, new: b, tests: [t.py]}", "patches.yaml: wrong has the keys"),
        ("wrong: {breaks: It., file: a.py, old: a, new: b, tests: [t.py], why: x}", "must have"),
    ],
)
def test_data_that_describe_no_patch_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "patches.yaml").write_text(text)
    with pytest.raises(PatchError, match=message):
        read_patches(tmp_path)


def test_a_name_is_used_once(tmp_path: Path) -> None:
    for name in ("model.yaml", "server.yaml"):
        (tmp_path / name).write_text("wrong: {breaks: It., file: a.py, old: a, new: b, tests: [t.py]}")
    with pytest.raises(PatchError, match="two patches have the name wrong"):
        read_patches(tmp_path)


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no_such_patch", "gate_without_tanh"]) == 2
    assert "no patch has the name or changes the path no_such_patch\n" in capsys.readouterr().err


def test_a_folder_without_git_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a git checkout"):
        tracked_files(tmp_path)
