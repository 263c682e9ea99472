"""Sends mutated JSON bodies to a server: each must be served or clearly refused, and the connection must stay open."""

from __future__ import annotations

import json
import random

from bench import mixture
from bench.fuzz.isolated import Tally, rng_of
from bench.fuzz.mutation import mutate, mutate_json
from bench.target import JSON_HEADERS, LEAK, REQUEST_SECONDS, Answer, Request, Target, exchange

# requests for much work are not tested here
MAX_TOKENS = 64
CONTENT_TYPES = ("application/json", "application/json", "application/json; charset=utf-16", "text/plain", "", "a/b;c")


def run(target: Target, num_inputs: int, seed: int) -> Tally:
    """Send mutated bodies on one connection after the other."""
    mixture.prepare(target)
    tally, connection = Tally(), target.connect(REQUEST_SECONDS)
    restarts = target.gauges()["engine_restarts_total"]
    for number in range(num_inputs):
        request = mutated(rng_of(seed, number))
        answer = exchange(connection, request)
        if answer.status == 0 or answer.headers.get("connection") == "close":
            connection.close()
        tally.num_inputs += 1
        if (failure := fault(answer)) is not None:
            tally.add(f"{request.method} {request.path.partition('?')[0]}: {failure}", number)
        if number == num_inputs // 10:
            tally.early_mb = target.resident_mb()
    connection.close()
    tally.late_mb = target.resident_mb()
    tally.num_ends = int(target.gauges()["engine_restarts_total"] - restarts)
    mixture.clean(target)
    return tally


def mutated(rng: random.Random) -> Request:
    """Return a request of the mixture with a mutated body."""
    _, request = mixture.draw(rng)
    if "json" not in request.headers.get("Content-Type", ""):
        return Request(
            method=request.method, path=request.path, body=mutate(request.body, rng), headers=request.headers
        )
    fields = json.loads(request.body)
    if "max_tokens" in fields:
        fields["max_tokens"] = min(fields["max_tokens"], MAX_TOKENS)
    headers = JSON_HEADERS if rng.random() < 0.95 else {"Content-Type": rng.choice(CONTENT_TYPES)}
    return Request(path=request.path, body=mutate_json(fields, rng), headers=headers)


def fault(answer: Answer) -> str | None:
    if answer.status == 0:
        return f"no answer: {answer.error}"
    if answer.status == 503 and b"engine_died" in answer.body:
        return "the worker died"
    return None if answer.is_clear else f"{answer.status} {LEAK.sub(b'?', answer.body[:120])!r}"
