"""The structure's numbers: lines, folders and imports of small trees, and one request traced in a real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.structure import (
    ROUTES,
    Trace,
    import_row,
    largest_folder,
    line_rows,
    main,
    python_files,
    trace_routes,
)
from bench.table import ROOT

FILES = {
    "kernels/norm.py": 3,
    "kernels/bench/norm.py": 50,
    "model/flamingo.py": 5,
    "model/__pycache__/old.py": 100,
    "model/build/lib/flamingo.py": 100,
    "server/__main__.py": 7,
    "server/api/chat.py": 11,
    "server/api/score.py": 13,
    "server/api/schemas/chat.py": 17,
    "tests/test_chat.py": 19,
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for path, num_lines in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x\n" * num_lines)
    return tmp_path


def lines(tree: Path, *aside: str) -> dict[str, object]:
    return {str(row["of"]): row["number"] for row in line_rows(tree, [tree / path for path in aside])}


def test_lines_are_counted_by_room(tree: Path) -> None:
    counted = lines(tree)
    assert counted["kernels without kernels/bench"] == 3
    assert counted["model"] == 5
    assert counted["server"] == 48
    assert counted["server/*.py"] == 7
    assert counted["server/api"] == 41
    assert counted["tests"] == 19
    assert counted["training"] == 0
    assert counted["kernels + model + server"] == 56


def test_files_that_are_set_aside_are_subtracted_once(tree: Path) -> None:
    counted = lines(tree, "server/api/schemas", "server/api/chat.py", "server/api/schemas/chat.py")
    assert counted["aside"] == 28
    assert counted["kernels + model + server, less aside"] == 28
    assert lines(tree, "tests")["kernels + model + server, less aside"] == 56


def test_build_outputs_are_no_files_of_the_project(tree: Path) -> None:
    assert [file.name for file in python_files(tree / "model")] == ["flamingo.py"]


def test_the_largest_folder_counts_its_own_files_alone(tree: Path) -> None:
    row = largest_folder(tree)
    assert (row["of"], row["number"]) == ("server/api", 2)


def test_imports_are_counted_with_their_packages(tmp_path: Path) -> None:
    for path, text in {
        "server/__init__.py": "",
        "server/app.py": "import json, model.prompt",
        "model/__init__.py": "",
        "model/prompt.py": "",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    row = import_row(tmp_path, ["server.app"], "server.app")
    assert (row["number"], row["packages"]) == (4, 2)


def test_traces_are_sets() -> None:
    left, right = (Trace(frozenset({"f", name}), frozenset({"T"}), frozenset()) for name in ("g", "h"))
    assert len(left | right) == 4
    assert (left ^ right).functions == {"g", "h"}
    assert not len(left ^ left)
    assert left.names() == "  function  f\n  function  g\n  type      T"


def test_the_command_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--static", "--entries", "server.settings", "server.wire"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    imported = {row["of"]: row for row in printed["rows"] if row["measure"] == "modules imported"}
    assert all(row["number"] > row["packages"] > 0 for row in imported.values())
    assert imported["all of them"]["number"] >= max(row["number"] for row in imported.values())


def test_a_path_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--static", "--aside", "no/such/file.py"])


def test_the_requests_are_traced_in_a_real_server() -> None:
    first, second = trace_routes(ROOT, ROUTES)
    assert first == second
    endpoints = ("create_completion", "create_fewshot_completion", "create_classification")
    for trace, endpoint in zip(first.values(), endpoints, strict=True):
        entered = {name.rpartition(":")[2] for name in trace.functions}
        assert {endpoint, "Engine.step"} <= entered
        assert trace.records < trace.types
