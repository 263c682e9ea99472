"""Options of a stream are refused for a request without one, in every route that streams."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.anyio

REQUESTS: dict[str, dict[str, Any]] = {
    "completions": {"prompt": "x"},
    "chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "fewshot/completions": {"query": {"question": "x"}, "template": {"shot": "{question} {answer}"}},
}


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("option", ["include_usage", "continuous_usage_stats"])
async def test_options_of_a_stream_need_one(http: httpx.AsyncClient, path: str, option: str) -> None:
    fields = REQUESTS[path]
    refused = await http.post(f"/v1/{path}", json={**fields, "stream_options": {option: True}})
    assert refused.status_code == 422, refused.text
    assert refused.json()["error"]["param"] == f"stream_options.{option}"
    assert (await http.post(f"/v1/{path}", json={**fields, "stream_options": {option: False}})).status_code == 200
