"""Commands that measure a server end with one line if it fails or none answers."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from contextlib import closing
from importlib import import_module
from pathlib import Path
from socket import socket

import pytest

from evaluation.options import add_data_option, connected
from flamboyance_client import NotAuthorised
from flamboyance_client.errors import Refusal
from training.default_data.records import DATA


@pytest.fixture
def unused_url() -> str:
    """The URL of a port at which nothing listens."""
    with closing(socket()) as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_no_server_ends_the_command_with_one_line(unused_url: str) -> None:
    with pytest.raises(SystemExit) as ended, connected(unused_url, None) as client:
        client.embed(["a"])
    assert str(ended.value).startswith(f"error: no connection to {unused_url}: ")
    assert str(ended.value).endswith(". Start a server there, or give the URL of another one.")
    assert "\n" not in str(ended.value)


def test_a_refused_key_names_the_option() -> None:
    with pytest.raises(SystemExit) as ended, connected("http://server", None):
        raise NotAuthorised(Refusal(message="an API key is needed", status=401))
    assert str(ended.value) == "error: an API key is needed: pass --api-key"


def test_what_is_no_url_ends_the_command_with_one_line() -> None:
    with (
        pytest.raises(SystemExit, match=r"^error: 'localhost:8000' is not the URL of a server"),
        connected("localhost:8000", ""),
    ):
        pass


def test_a_folder_that_was_not_built_ends_the_command_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = ArgumentParser()
    add_data_option(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--data", str(tmp_path)])
    *_, last = capsys.readouterr().err.splitlines()
    expected = f"{tmp_path / DATA} does not exist: build it with python -m training.default_data"
    assert last.endswith(f"error: argument --data: {expected}")
    (tmp_path / DATA).touch()
    assert parser.parse_args(["--data", str(tmp_path)]).data == tmp_path


@pytest.mark.parametrize(
    ("module", "option", "least"),
    [
        ("abstention", "--fresh", 1),
        ("abstention", "--sets", 1),
        ("abstention", "--shots", 1),
        ("abstention", "--ways", 2),
        ("default", "--controls", 0),
        ("default", "--episodes", 1),
        ("default", "--processes", 1),
        ("diagnostics", "--fresh", 1),
        ("diagnostics", "--per-label", 1),
        ("diagnostics", "--sets", 1),
        ("diagnostics", "--ways", 2),
        ("encoders", "--threads", 1),
        ("estimates", "--per-label", 1),
        ("estimates", "--sets", 1),
        ("estimates", "--ways", 2),
        ("forms", "--episodes", 1),
        ("forms", "--order-episodes", 0),
        ("forms", "--orders", 0),
        ("leave_one_out", "--examples", 1),
        ("leave_one_out", "--fresh", 1),
        ("leave_one_out", "--k", 1),
        ("leave_one_out", "--permutations", 1),
        ("leave_one_out", "--sets", 1),
        ("leave_one_out", "--ways", 2),
        ("methods", "--episodes", 1),
        ("methods", "--rounds", 1),
        ("methods", "--ways", 2),
        ("paper.cost", "--rounds", 2),  # quartiles need two
        ("paper.shots", "--episodes", 1),
        ("stages", "--processes", 1),
        ("suggestions", "--counts", 1),
        ("suggestions", "--fresh", 1),
        ("suggestions", "--per-label", 1),
        ("suggestions", "--pool", 1),
        ("suggestions", "--sets", 1),
        ("suggestions", "--ways", 2),
    ],
)
def test_a_count_that_is_too_small_ends_the_command_with_one_line(
    module: str, option: str, least: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module, option, str(least - 1)])
    with pytest.raises(SystemExit):
        import_module(f"evaluation.{module}").main()
    *_, last = capsys.readouterr().err.splitlines()
    assert last.endswith(f"error: argument {option}: {least - 1} is less than {least}")
