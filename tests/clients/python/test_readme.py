"""Tests that the examples of the README run unchanged, with a fake server and the images of docs/examples."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[3]
README = ROOT / "clients" / "python" / "README.md"
# Those with the folder of textures run with a real server, in test_fewshot_server.py.
EXAMPLES = [
    block
    for block in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    if "textures" not in block
]
CHOICES = {"id": "cmpl-1", "model": "tiny", "choices": [{"index": 0, "text": " heron"}]}


def reply(request: httpx.Request) -> httpx.Response:
    if json.loads(request.content).get("stream"):
        return httpx.Response(200, text=f"data: {json.dumps(CHOICES)}\n\ndata: [DONE]\n\n")
    return httpx.Response(200, json=CHOICES)


async def reply_async(_: object, request: httpx.Request) -> httpx.Response:
    return reply(request)


def test_the_readme_has_three_examples_of_prompts() -> None:
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("example", EXAMPLES, ids=["complete", "stream", "async"])
def test_the_example_runs(example: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", lambda _, request: reply(request))
    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", reply_async)
    exec(compile(example, str(README), "exec"), {"__name__": "__main__"})
    assert " heron" in capsys.readouterr().out
