"""A server of support sets and queries in memory, which answers each request as a script of the test says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

Body = dict[str, Any]
# returns the response to a request of a route, by the number of such requests so far; None: as a server answers
Script = Callable[[str, int, Body], httpx.Response | None]
QUERIES = "POST /v1/fewshot/completions"
EXAMPLES = "POST examples"


def error(status: int, message: str, headers: Mapping[str, str] | None = None, **fields: Any) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message, **fields}}, headers=headers)


def answer_normally(route: str, number: int, body: Body) -> None:
    return None


@dataclass
class ScriptedServer:
    """A transport for `httpx.MockTransport`. Support sets are in `sets` by their ids."""

    script: Script = answer_normally
    sets: dict[str, Body] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    models: list[Body] = field(default_factory=lambda: [{"id": "tiny", "object": "model"}])

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else {}
        path = request.url.path
        route = EXAMPLES if path.endswith("/examples") else f"{request.method} {path.partition('/ss_')[0]}"
        self.counts[route] += 1
        if (response := self.script(route, self.counts[route], body)) is not None:
            return response
        if path == "/v1/models":
            return httpx.Response(200, json={"object": "list", "data": self.models})
        if route == QUERIES:
            return httpx.Response(200, json={"choices": [{"index": 0, "text": " a thing"}]})
        return self._support_sets(request.method, path.removeprefix("/v1/support_sets").strip("/").split("/"), body)

    def _support_sets(self, method: str, path: list[str], body: Body) -> httpx.Response:
        if method == "POST" and path == [""]:
            identity = f"ss_{len(self.sets) + 1}"
            self.sets[identity] = {"id": identity, "version": 1, "name": None, "metadata": {}, "examples": {}}
            return self._card(identity)
        stored = next((s for s in self.sets.values() if path[0] in (s["id"], s["name"])), None)
        if stored is None:
            return error(404, "no such set", code="support_set_not_found")
        if method == "DELETE":
            del self.sets[stored["id"]]
            return httpx.Response(200, json={"id": stored["id"], "deleted": True})
        if method == "PATCH":
            names = {s["name"] for s in self.sets.values() if s is not stored}
            if body.get("name") in names - {None}:
                return error(409, "the name is taken", code="name_taken")
            stored.update(body)
        if method == "POST":
            stored["version"] += 1
            stored["examples"] |= {example["id"]: example for example in body["examples"]}
        return self._card(stored["id"])

    def _card(self, identity: str) -> httpx.Response:
        stored = self.sets[identity]
        fields = {name: stored[name] for name in ("id", "version", "name", "metadata")}
        return httpx.Response(200, json={**fields, "num_examples": len(stored["examples"])})
