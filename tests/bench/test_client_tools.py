"""Tests of the command of the clients, with scripts in place of the clients' own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import client_tools
from bench.client_scripts.habits import expect, report
from bench.client_tools import CLIENTS, NodeClient, PythonClient, _parser, habits, main, run
from bench.options import as_settings, parse
from bench.table import ROOT

LINE = '{"habit": "chat", "ok": true, "detail": "a cat"}'


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_row_holds_what_the_script_reports() -> None:
    lines = [LINE, "a warning", '{"habit":"embed","ok":false,"detail":"Error:\\n  no vector"}']
    assert habits(python(f"print({chr(10).join(lines)!r})")) == [
        {"habit": "chat", "result": "ok", "detail": "a cat"},
        {"habit": "embed", "result": "failed", "detail": "Error: no vector"},
    ]


def test_a_script_finds_the_scripts_and_the_python_client() -> None:
    code = f"import bench.client_scripts, flamboyance_client.prompt; print({LINE!r})"
    assert [row["result"] for row in habits(python(code))] == ["ok"]


@pytest.mark.parametrize(
    ("code", "detail"),
    [
        (f"print({LINE!r}); raise SystemExit('no luck')", "it ended with status 1: no luck"),
        ("pass", "it ended with status 0:"),
    ],
)
def test_a_script_that_fails_or_reports_nothing_is_a_failed_row(code: str, detail: str) -> None:
    assert habits(python(code))[-1] == {"habit": "script", "result": "failed", "detail": detail}


def test_a_script_that_does_not_end_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_tools, "SCRIPT_SECONDS", 0)
    (row,) = habits(python("import signal; signal.pause()"))
    assert (row["habit"], row["result"]) == ("script", "failed")


def test_a_missing_node_is_a_failed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run("openai-node", CLIENTS["openai-node"], tmp_path, []) == [
        {
            "client": "openai-node",
            "version": None,
            "habit": "installation",
            "result": "failed",
            "detail": "node is not installed",
        }
    ]


@pytest.mark.parametrize(
    ("name", "script", "packages"),
    [("openai-node", "openai_node.mjs", ["openai", "zod"]), ("promptfoo", "promptfoo.mjs", ["promptfoo"])],
)
def test_a_client_of_node_runs_in_the_folder_of_its_packages(
    name: str, script: str, packages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for program in ("node", "npm"):
        (tmp_path / program).write_text("#!/bin/false\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    client = CLIENTS[name]
    assert isinstance(client, NodeClient)
    for package in packages:
        folder = tmp_path / name / "node_modules" / package
        folder.mkdir(parents=True)
        (folder / "package.json").write_text(json.dumps({"version": f"1 of {package}"}))
    copy = tmp_path / name / script
    assert client.command(name, tmp_path) == [str(tmp_path / "node"), str(copy)]
    assert copy.exists()
    assert client.version(name, tmp_path) == f"1 of {packages[0]}"


@pytest.mark.parametrize(("result", "status"), [("ok", 0), ("failed", 1)])
def test_the_status_says_whether_a_habit_failed(
    result: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"client": "litellm", "version": "1", "habit": "chat", "result": result, "detail": ""}
    monkeypatch.setattr(client_tools, "run", lambda name, *_: [{**row, "client": name}])
    assert main(["litellm", "--model", "tiny", "--quick"]) == status
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["rows"] == [{**row, "client": "litellm"}]
    assert [bar["is_met"] for bar in printed["bars"]] == [status == 0]


def test_each_client_has_its_script() -> None:
    for client in CLIENTS.values():
        file = f"{client.module.replace('.', '/')}.py" if isinstance(client, PythonClient) else client.script
        assert (ROOT / file).exists() or (client_tools.SCRIPTS / file).exists()


def test_habits_are_reported_after_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    def chat() -> str:
        expect(False, "no answer")
        return "a cat"

    report({"chat": chat, "embed": lambda: "2 vectors"})
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"habit": "chat", "ok": False, "detail": "AssertionError: no answer"},
        {"habit": "embed", "ok": True, "detail": "2 vectors"},
    ]


def test_the_options_can_be_written_to_the_last_line() -> None:
    settings = json.loads(json.dumps(as_settings(parse(_parser(), ["lm-eval"], {}))))
    assert settings["clients"] == ["lm-eval"]
