"""Tests of what the command line says of errors, asks before it deletes, and needs to be installed."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import tomllib
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from PIL import Image

from flamboyance_client import Client, NotConnected
from flamboyance_client.cli import app as application
from flamboyance_client.cli import support_sets
from flamboyance_client.cli.connection import message_of
from flamboyance_client.connection import checked_url, transport_errors
from flamboyance_client.errors import NotAuthorised, Refusal, TimedOut
from tests.clients.python.cli.commands import PACKAGE, process, run
from tests.clients.serving import KEY

ROOT = Path(__file__).resolve().parents[4]


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("support-set", "create", "nowhere"), "there is no file or folder 'nowhere'"),
            (
                ("support-set", "create", "a.png"),
                "a.png is a file; a folder whose subfolders are named after the labels ",
            ),
            (("support-set", "create", "фото", "--url", "foo"), "'foo' is not the URL"),
            (
                ("support-set", "create", "фото"),
                "the name of the folder фото cannot be the name of a support set: give --name",
            ),
            (("support-set", "create", "pets", "--name", ""), "'' is not a name or id"),
            (("ask", "pets", "What?"), "'pets' is a folder; a file is needed"),
            (("ask", "b.png", "What?"), "there is no file 'b.png'\n"),
            (
                ("support-set", "export", "pets", "-"),
                "- is no name of a file here; standard output is written as /dev/",
            ),
            (("support-set", "import", "-"), "- is no name of a file here; standard input is read as /dev/stdin\n"),
            (
                ("ask", "a.png", "What", "is", "this?"),
                "there is no file 'What'; the question is one argument, in quotes if",
            ),
            (
                ("classify", "a.png", "-f", "фото"),
                "the name of the folder фото cannot be the name of a support set: create ",
            ),
        ],
    )
    def test_a_wrong_path_or_name_says_what_is_needed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for folder in ("pets", "фото"):
            (tmp_path / folder / "cat").mkdir(parents=True)
            Image.new("RGB", (9, 7), "red").save(tmp_path / folder / "cat" / "1.png")
        Image.new("RGB", (9, 7), "red").save(tmp_path / "a.png")
        _, errors = run(*arguments, status=1)
        assert errors.startswith(f"error: {message}")
        assert errors.count("\n") == 1

    def test_a_file_that_cannot_be_read_is_named_with_the_reason(self) -> None:
        error = PermissionError(13, "Permission denied", "a.png")
        assert message_of(error, "http://host") == "'a.png': Permission denied"

    def test_shots_need_a_set(self) -> None:
        _, errors = run("ask", "http://host/a.png", "What?", "-k", "2", status=2)
        assert errors == "error: Invalid value for -k: it needs --support-set, from which the shots are taken\n"

    @pytest.mark.parametrize(
        ("arguments", "option", "choices"),
        [
            (
                ("evaluate", "pets", "--method", "all"),
                "--method",
                "'in_context', 'nearest_mean', 'knn', 'linear', 'blend'",
            ),
            (
                ("evaluate", "pets", "--control", "all"),
                "--control",
                "'text_only', 'shuffled_labels', 'encoder_features'",
            ),
            (("evaluate", "pets", "--shots-attend", "all"), "--shots-attend", "'previous', 'alone'"),
            (
                ("test", "pets", "a", "--method", "all"),
                "--method",
                "'in_context', 'nearest_mean', 'knn', 'linear', 'blend', ",
            ),
        ],
    )
    def test_a_value_that_is_no_choice_is_refused_with_the_choices(
        self, arguments: tuple[str, ...], option: str, choices: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        _, errors = run("support-set", *arguments, status=2)
        assert errors.startswith(f"error: Invalid value for '{option}': 'all' is not one of {choices}")
        _, errors = run("classify", "a.png", "-s", "pets", "--method", "all", status=2)
        assert errors.startswith("error: Invalid value for '--method': 'all' is not one of 'in_context', ")

    def test_a_server_that_does_not_run_is_named(self) -> None:
        _, errors = run("support-set", "list", "--url", "http://127.0.0.1:9", status=1)
        assert errors.count("\n") == 1
        assert errors.startswith("error: no server at http://127.0.0.1:9 (")
        assert "flamboyance serve" in errors

    @pytest.mark.parametrize(
        ("cause", "message"),
        [
            (httpx.ConnectTimeout(""), "no server at http://host (ConnectTimeout): start one with"),
            (httpx.PoolTimeout(""), "all connections of this client are in use: send fewer requests at a time"),
        ],
    )
    def test_a_full_connection_pool_is_not_a_missing_server(self, cause: Exception, message: str) -> None:
        with pytest.raises(NotConnected) as caught, transport_errors():
            raise cause
        assert message_of(caught.value, "http://host").startswith(message)

    @pytest.mark.parametrize("cause", [httpx.ReadTimeout("timed out"), httpx.WriteTimeout("")])
    def test_a_server_that_does_not_reply_is_no_advice_about_the_library(self, cause: Exception) -> None:
        with pytest.raises(TimedOut) as caught, transport_errors():
            raise cause
        message = message_of(caught.value, "http://user:secret@host")
        assert message.startswith("no reply from http://host in time: the server may be overloaded")
        assert "Client" not in message

    def test_https_to_a_server_without_tls_is_no_missing_server(self, url: str) -> None:
        address = url.replace("http://", "https://")
        _, errors = run("support-set", "list", "--url", address, status=1)
        assert errors.startswith(f"error: no connection to {address}: [SSL")
        assert errors.endswith(". If the server has no TLS, its URL begins with http://.\n")

    @pytest.mark.parametrize(
        ("code", "fault", "advice"),
        [
            (
                18,
                "self-signed certificate",
                "Set SSL_CERT_FILE to a file with the certificates of the authorities",
            ),
            (20, "unable to get local issuer certificate", "Set SSL_CERT_FILE to a file with"),
            (10, "certificate has expired", "The certificate of the server is not valid: certificate has expired."),
            (62, "Hostname mismatch.", "The certificate of the server is not valid: Hostname mismatch."),
        ],
    )
    def test_a_certificate_that_is_refused_is_no_missing_server(self, code: int, fault: str, advice: str) -> None:
        cause = ssl.SSLCertVerificationError(1, "refused")
        cause.verify_code, cause.verify_message = code, fault
        with pytest.raises(NotConnected) as caught, transport_errors():
            raise httpx.ConnectError("refused", request=httpx.Request("GET", "https://host/a")) from cause
        message = message_of(caught.value, "https://host")
        assert message.startswith(f"no connection to https://host: refused. {advice}")

    def test_an_earlier_failure_of_tls_is_no_advice_about_a_later_request(self) -> None:
        error = httpx.ConnectError("refused", request=httpx.Request("GET", "http://host/a"))
        error.__context__ = ssl.SSLError(1, "wrong version number")
        with pytest.raises(NotConnected) as caught, transport_errors():
            raise error
        assert "Is a server running there?" in str(caught.value)
        assert message_of(caught.value, "http://host").startswith("no server at http://host (refused)")

    def test_a_proxy_that_does_not_run_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for variable in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        _, errors = run("support-set", "list", "--url", "http://192.0.2.1:8000", status=1)
        assert errors.count("\n") == 1
        assert errors.startswith("error: no connection to http://192.0.2.1:8000: ")
        assert "goes through the proxy 127.0.0.1:9: HTTP_PROXY" in errors

    def test_a_package_that_a_proxy_needs_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:9")
        _, errors = run("support-set", "list", status=1)
        assert errors.count("\n") == 1
        assert "pip install httpx[socks]" in errors

    def test_a_wrong_url_is_named(self) -> None:
        _, errors = run("support-set", "list", "--url", "foo", status=1)
        assert errors == "error: 'foo' is not the URL of a server: begin it with http:// or https://\n"

    def test_the_url_of_an_openai_client_is_that_of_the_server(self) -> None:
        assert str(checked_url("http://localhost:8000/v1/")) == "http://localhost:8000"
        assert str(checked_url("https://a.org/models/v1")) == "https://a.org/models"

    def test_a_wrong_key_is_named(self) -> None:
        _, errors = run("support-set", "list", "--api-key", "wrong", "--json", status=1)
        assert errors.startswith("error: 401: ")
        assert "--api-key or FLAMBOYANCE_API_KEY" in errors

    def test_only_a_refusal_of_the_key_is_about_the_key(self) -> None:
        codes = {"invalid_api_key": 401, "permission_denied": 403, "too_many_support_sets": 403, None: 403}
        errors = [NotAuthorised(Refusal(message="no", code=code, status=status)) for code, status in codes.items()]
        hint = " (--api-key or FLAMBOYANCE_API_KEY)"
        messages = [message_of(error, "http://server") for error in errors]
        assert messages == [f"401: no{hint}", f"403: no{hint}", "403: no", "403: no"]

    def test_a_key_that_cannot_be_sent_is_not_shown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLAMBOYANCE_API_KEY", "secret\nkey")
        _, errors = run("support-set", "list", status=1)
        assert errors.startswith("error: api_key has a character that no key has")
        assert "secret" not in errors

    def test_a_key_may_end_with_a_line_break_and_an_empty_one_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLAMBOYANCE_API_KEY", f"{KEY}\n")
        run("support-set", "list")
        monkeypatch.setenv("FLAMBOYANCE_API_KEY", "")
        for arguments in ([], ["--api-key", ""]):
            _, errors = run("support-set", "list", *arguments, status=1)
            assert errors.startswith("error: 401: ")

    @pytest.mark.parametrize(
        "arguments",
        [("ask", "missing.png", "?"), ("classify", "missing.png", "-s", "x"), ("support-set", "import", "missing.zip")],
    )
    def test_a_missing_file_is_named(self, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
        assert application.run(arguments) == 1
        output = capsys.readouterr()
        assert "missing." in output.out + output.err
        assert output.err.startswith("error: ")
        assert output.err.count("\n") == 1

    def test_a_wrong_command_line_has_status_2(self, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments in (["support-set", "show"], ["show"], ["ask", "--colour"], ["classify", "a", "--strategy", "x"]):
            assert application.run(arguments) == 2, arguments
            output = capsys.readouterr()
            assert (output.out, output.err.count("\n")) == ("", 1)
            assert output.err.startswith("error: ")

    def test_a_group_without_a_command_shows_its_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments in ([], ["support-set"]):
            assert application.run(arguments) == 2
            output = capsys.readouterr()
            assert output.out.lstrip().startswith("Usage: flamboyance-client ")
            assert output.err == ""

    @pytest.mark.parametrize("name", ["", ".", ".."])
    def test_what_can_be_no_name_is_refused_before_it_is_sent(self, name: str) -> None:
        for command in ("show", "delete", "evaluate", "export"):
            _, errors = run("support-set", command, name, status=1)
            assert errors == f"error: {name!r} is not a name or id\n"

    def test_the_version_is_that_of_the_package(self) -> None:
        assert process("--version") == f"flamboyance-client {metadata.version('flamboyance-client')}\n"

    def test_help_is_no_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments in (["--help"], ["support-set", "--help"], ["support-set", "export", "--help"]):
            assert application.run(arguments) == 0
        output = capsys.readouterr()
        assert "FLAMBOYANCE_URL" in output.out
        assert output.err == ""

    @pytest.mark.parametrize("command", [["classify"], ["support-set", "suggest"], ["support-set", "delete"]])
    def test_the_usage_repeats_no_dots(self, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert application.run([*command, "--help"]) == 0
        assert "...}" not in capsys.readouterr().out

    def test_no_line_of_a_help_text_ends_early(self) -> None:
        """Help keeps the line breaks of a paragraph after the first, so such a paragraph has one line."""
        for command in (*application.app.registered_commands, *support_sets.app.registered_commands):
            _, *paragraphs = (command.callback.__doc__ or "").strip().split("\n\n") if command.callback else [""]
            assert all(len(paragraph.strip().splitlines()) == 1 for paragraph in paragraphs), command.name

    @pytest.mark.parametrize(("command", "name"), [("create", "FOLDER"), ("import", "FILE")])
    def test_a_missing_argument_has_the_name_of_the_documentation(self, command: str, name: str) -> None:
        _, errors = run("support-set", command, status=2)
        assert errors == f"error: Missing argument '{name}'.\n"


class TestDelete:
    @pytest.mark.parametrize(("answer", "status"), [(True, 0), (False, 1)])
    def test_a_terminal_is_asked(
        self, made: Client, monkeypatch: pytest.MonkeyPatch, answer: bool, status: int
    ) -> None:
        def confirm(text: str, **_: Any) -> None:
            assert text == "Delete asked?"
            if not answer:
                raise typer.Abort

        made.support_sets.create(name="asked", exist_ok=True)
        monkeypatch.setattr("sys.stdin.isatty", lambda: True)
        monkeypatch.setattr(typer, "confirm", confirm)
        assert application.run(["support-set", "delete", "asked"]) == status
        assert ("asked" in [entry.name for entry in made.support_sets.list(limit=1000)]) is not answer


class TestInstallation:
    def test_the_commands_of_the_package_exist(self) -> None:
        project = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        points = {**project["scripts"], **project["entry-points"]["flamboyance.commands"]}
        for name, value in points.items():
            module, _, attribute = value.partition(":")
            assert callable(getattr(import_module(module), attribute)), name
        names = {command.callback.__name__ for command in application.app.registered_commands if command.callback}
        names |= {str(group.name) for group in application.app.registered_groups}
        assert names == project["entry-points"]["flamboyance.commands"].keys()

    @pytest.mark.parametrize("module", ["typer", "httpx"])
    @pytest.mark.parametrize(
        "start", [("-m", "flamboyance_client"), ("-c", "from flamboyance_client import cli; cli.main()")]
    )
    def test_an_interrupt_of_an_import_is_no_traceback(
        self, start: tuple[str, ...], module: str, tmp_path: Path
    ) -> None:
        (tmp_path / f"{module}.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n", encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(PACKAGE / "src")])}
        command = [sys.executable, *start, "support-set", "list"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "")

    def test_the_library_does_not_need_the_extra(self) -> None:
        """Without typer, the library works, and the command says how to install it."""
        block = "import sys; sys.modules.update(typer=None, rich=None);"
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE / "src")}
        for code, status, message in (
            ("import flamboyance_client", 0, ""),
            (
                "from importlib import util; util.find_spec = lambda name: None;"
                "from flamboyance_client.cli import main; main()",
                1,
                "error: the command line needs another package: pip install 'flamboyance-client[cli]'\n",
            ),
        ):
            done = subprocess.run([sys.executable, "-c", block + code], env=environment, capture_output=True, text=True)
            assert (done.returncode, done.stdout, done.stderr) == (status, "", message)
