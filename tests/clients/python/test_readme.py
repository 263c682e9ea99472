"""The README's examples run as they stand, against an imagined server and the images of docs/examples."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[3]
README = ROOT / "clients" / "python" / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
CHOICES = {"id": "cmpl-1", "model": "tiny", "choices": [{"index": 0, "text": " heron"}]}


OTHERS = {
    "/v1/support_sets": {"id": "ss_1", "version": 1},
    "/v1/classify": {"label": "heron", "confidence": 1.0, "candidates": []},
    "/v1/fewshot/completions": {**CHOICES, "fewshot": {"shots": [{"id": "cat"}]}},
}


def reply(request: httpx.Request) -> httpx.Response:
    if request.url.path in OTHERS:
        return httpx.Response(200, json=OTHERS[request.url.path])
    if json.loads(request.content).get("stream"):
        return httpx.Response(200, text=f"data: {json.dumps(CHOICES)}\n\ndata: [DONE]\n\n")
    return httpx.Response(200, json=CHOICES)


async def reply_async(_: object, request: httpx.Request) -> httpx.Response:
    return reply(request)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize("example", EXAMPLES, ids=["complete", "support set", "stream", "async"])
def test_the_example_runs(example: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT / "docs" / "examples")
    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", lambda _, request: reply(request))
    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", reply_async)
    exec(compile(example, str(README), "exec"), {"__name__": "__main__"})
    assert " heron" in capsys.readouterr().out
