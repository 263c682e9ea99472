"""The command `flamboyance`: its programs, the commands of other distributions, and errors in one line."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import ModuleType

import pytest
import typer

from flamboyance import command_line, plugins
from flamboyance.application import ROOT, load
from flamboyance.command_line import CLIENT_COMMANDS, PROGRAMS, main

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


@pytest.fixture(autouse=True)
def original_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore sys.path, and the hook for uncaught errors that Typer replaces."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], str]]:
    """Return the calls of programs: their modules, arguments and names; each program returns 3."""
    calls: list[tuple[str, list[str], str]] = []

    def load_program(name: str) -> ModuleType:
        def run(arguments: Sequence[str], prog: str) -> int:
            calls.append((name, list(arguments), prog))
            return 3

        module = ModuleType(name)
        module.main = run  # type: ignore[attr-defined]
        return module

    monkeypatch.setattr(command_line, "load", load_program)
    return calls


def test_a_program_gets_its_arguments_unchanged_and_gives_the_exit_status(
    calls: list[tuple[str, list[str], str]],
) -> None:
    assert main(["serve", "folder", "--port", "0", "--help", "--spare-worker=false", "-x"]) == 3
    assert main(["import", "idefics", "--from", "a"]) == 3
    assert main(["join", "--out", "b"]) == 3
    assert calls == [
        (
            "server.start",
            ["folder", "--port", "0", "--help", "--spare-worker=false", "-x"],
            "flamboyance serve",
        ),
        ("model.checkpoint.__main__", ["import", "idefics", "--from", "a"], "flamboyance"),
        ("model.checkpoint.__main__", ["join", "--out", "b"], "flamboyance"),
    ]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_describes_itself_under_its_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: flamboyance {name} ")


@pytest.mark.parametrize(
    "words", [*([name] for name in PROGRAMS), ["import", "openflamingo"], ["import", "idefics"], ["import", "me/model"]]
)
def test_help_says_what_a_command_does_and_names_no_module(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    usage, description, *rest = capsys.readouterr().out.split("\n\n")
    assert usage.startswith("usage: ")
    assert re.match(r"[A-Z].*\.$", description, flags=re.DOTALL)
    assert not re.search(r"python -m|\.py\b", " ".join([usage, description, *rest]))


def test_a_program_without_the_client_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_program(name: str) -> ModuleType:
        raise ModuleNotFoundError(name="flamboyance_client")

    monkeypatch.setattr(command_line, "load", load_program)
    assert main(["evaluate", "coco"]) == 1
    error = capsys.readouterr().err
    assert error == "error: flamboyance evaluate needs flamboyance_client: pip install ./clients/python\n"


def test_a_model_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "flamingo-3b"]) == 0
    assert capsys.readouterr().out.startswith("flamingo-3b: gated layers before [0, 1,")


def test_without_arguments_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    output = capsys.readouterr().out
    assert "Usage: flamboyance" in output
    assert all(f" {name} " in output for name in PROGRAMS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["swim"], "error: No such command 'swim'.\n"),
        (["serv"], "error: No such command 'serv'. Did you mean 'serve'?\n"),
        (["--swim"], "error: No such option: --swim\n"),
    ],
)
def test_an_unknown_command_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr() == ("", message)


def test_a_value_that_is_no_choice_is_refused_with_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", "a.png", "-s", "pets", "--shots-attend", "all"]) == 2
    error = "error: Invalid value for '--shots-attend': 'all' is not one of 'previous', 'alone'.\n"
    assert capsys.readouterr() == ("", error)


def test_python_m_prints_the_version_without_torch_and_web_framework() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "flamboyance", "--version"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout == f"flamboyance {VERSION}\n"
    imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "fastapi", "server.start", "model.config", "rich.console"}


@pytest.mark.parametrize("module", ["typer", "flamboyance_client"])
def test_an_interrupt_of_an_import_is_no_traceback(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n", encoding="utf-8")
    (tmp_path / "tiny-1.dist-info").mkdir()
    points = f"[{plugins.GROUP}]\nask = flamboyance_client.cli.ask:ask\n"
    (tmp_path / "tiny-1.dist-info" / "entry_points.txt").write_text(points, encoding="utf-8")
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "flamboyance", "ask"]
    finished = subprocess.run(
        command,
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job of a shell ignores it
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (130, "", "")


def test_the_application_takes_precedence_over_installed_packages() -> None:
    sys.path.insert(0, "elsewhere")
    assert load("server.version").__file__ == str(ROOT / "server" / "version.py")
    assert sys.path[:2] == [str(ROOT), "elsewhere"]


class TestPlugins:
    """The entry points of other distributions."""

    @pytest.fixture
    def register(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        """Return a function that registers entry points, by name; a text as value is where the entry point is."""

        def register(**values: object) -> None:
            module = ModuleType("tiny_plugin")
            for name, value in values.items():
                setattr(module, name, value)
            monkeypatch.setitem(sys.modules, "tiny_plugin", module)
            points = EntryPoints(
                EntryPoint(name, value if isinstance(value, str) else f"tiny_plugin:{name}", plugins.GROUP)
                for name, value in values.items()
            )
            monkeypatch.setattr(plugins, "entry_points", lambda group: points.select(group=group))

        return register

    def test_a_function_is_a_command(self, register: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
        def ask(question: str) -> None:
            """Ask a question."""
            print(f"asked {question}")

        register(ask=ask)
        assert main(["ask", "why"]) == 0
        assert capsys.readouterr() == ("asked why\n", "")
        assert main(["--help"]) == 0
        assert "Ask a question." in capsys.readouterr().out

    def test_an_application_with_one_command_is_that_command(
        self, register: Callable[..., None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        app = typer.Typer()

        @app.command()
        def question(text: str) -> None:
            print(f"asked {text}")
            raise typer.Exit(5)

        register(ask=app)
        assert main(["ask", "why"]) == 5
        assert capsys.readouterr() == ("asked why\n", "")

    def test_an_application_with_several_commands_is_a_group(
        self, register: Callable[..., None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        app = typer.Typer(no_args_is_help=True)
        app.command("list")(lambda: print("listed"))
        app.command("show")(lambda: print("shown"))
        register(sets=app)
        assert main(["sets", "show"]) == 0
        assert capsys.readouterr() == ("shown\n", "")
        assert main(["sets", "swim"]) == 2
        assert capsys.readouterr().err == "error: No such command 'swim'.\n"
        assert main(["sets"]) == 2
        output = capsys.readouterr()
        assert "Usage: flamboyance sets" in output.out
        assert output.err == ""

    def test_a_broken_one_is_one_line_and_does_not_stop_the_rest(
        self, register: Callable[..., None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        register(absent="no_such_module:app", number=3, serve=typer.Typer(), ask=lambda: print("asked"))
        assert main(["ask"]) == 0
        output = capsys.readouterr()
        assert output.out == "asked\n"
        assert output.err.splitlines() == [
            "warning: the command 'absent' of an unknown distribution is not available: "
            "ModuleNotFoundError: No module named 'no_such_module'",
            "warning: the command 'number' of an unknown distribution is not available: "
            "TypeError: expected a function or a Typer application, not 3",
            "warning: the command 'serve' of an unknown distribution is not available: "
            "ValueError: this is the name of a command of flamboyance itself",
        ]

    def test_the_commands_of_the_client_are_its_entry_points(self) -> None:
        client = tomllib.loads((ROOT / "clients" / "python" / "pyproject.toml").read_text(encoding="utf-8"))
        assert client["project"]["entry-points"][plugins.GROUP].keys() == set(CLIENT_COMMANDS)

    @pytest.mark.parametrize("name", CLIENT_COMMANDS)
    def test_a_command_of_the_client_says_how_to_install_it_if_it_is_missing(
        self, name: str, register: Callable[..., None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        register()
        assert main([name, "create", "photos", "--help"]) == 1
        error = f"error: flamboyance {name} needs flamboyance_client: pip install ./clients/python\n"
        assert capsys.readouterr() == ("", error)
        assert main(["--help"]) == 0
        assert "Needs the client: pip install ./clients/python" in capsys.readouterr().out

    def test_a_program_loads_none(
        self,
        register: Callable[..., None],
        calls: list[tuple[str, list[str], str]],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        register(absent="no_such_module:app")
        assert main(["describe"]) == 3
        assert capsys.readouterr() == ("", "")
