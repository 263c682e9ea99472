"""Logs have one line per event in both formats, and never contain prompts or keys."""

from __future__ import annotations

import json
import logging

import httpx
import pytest

from server.settings import Settings
from server.telemetry import logs
from tests.server.conftest import image_part


def test_a_json_line_contains_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    logging.getLogger("server.test").info("it happened", extra={"status": 503, "request_id": "é"})
    line = json.loads(capsys.readouterr().err)
    assert line.pop("time")
    assert line == {
        "level": "info",
        "logger": "server.test",
        "message": "it happened",
        "status": 503,
        "request_id": "é",
    }


def test_an_exception_stays_on_its_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    try:
        raise KeyError("why")
    except KeyError:
        logging.getLogger("server.test").exception("it failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert "KeyError: 'why'" in json.loads(line)["exception"]


def test_a_text_line_contains_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("warning", "text")
    logging.getLogger("server.test").info("not this")
    logging.getLogger("server.test").warning("it happened", extra={"status": 503})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("server.test: it happened  status=503")


@pytest.mark.parametrize(("level", "number"), [("debug", 1), ("info", 1), ("warning", 1), ("error", 0)])
@pytest.mark.parametrize("library", ["faiss.loader", "alembic.runtime.migration"])
def test_a_talkative_library_reports_warnings_alone(
    level: str, number: int, library: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(level, "text")
    logger = logging.getLogger(library)
    logger.info("Could not load library with AVX2 support due to:\nModuleNotFoundError('faiss.swigfaiss_avx2')")
    logger.warning("it failed")
    assert len(capsys.readouterr().err.splitlines()) == number


def test_a_line_break_in_a_field_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    logging.getLogger("server.test").info("refused", extra={"path": "/v1/models/x\n10:00:00 INFO server: forged"})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(r"path='/v1/models/x\n10:00:00 INFO server: forged'")


def test_a_path_cannot_forge_a_field(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    logging.getLogger("server.test").info("refused", extra={"path": "/x status=200", "query": "a='", "status": 404})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("""refused  path='/x status=200' query="a='" status=404""")


class TestContents:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(api_key="sesame open")

    @pytest.mark.anyio
    async def test_neither_prompts_nor_keys_are_logged(
        self, http: httpx.AsyncClient, capsys: pytest.CaptureFixture[str]
    ) -> None:
        logs.configure("debug", "json")
        headers = {"Authorization": "Bearer sesame open", "X-Request-Id": "find-me"}
        parts = [image_part(), {"type": "text", "text": "my diary"}]
        for body in ({"prompt": parts}, {"prompt": parts, "m": 2}, {"prompt": "my diary", "temperature": "my diary"}):
            await http.post("/v1/completions", json=body, headers=headers)
        written = capsys.readouterr().err
        assert "find-me" in written
        assert not any(secret in written for secret in ("diary", "sesame", "base64"))
