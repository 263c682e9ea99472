"""Attacks with what a client has stored and then requests again and again: many sets, and large ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

from bench import mixture
from bench.attacks.attack import Attack, repeated
from bench.driver import BenchFailed
from bench.target import Request, Target, get, post

NUM_SETS = 1000
NUM_EXAMPLES = 10_000
LARGE = "large"
# almost as many as a set may have, of almost as many characters
NUM_LABELS, LABEL_CHARACTERS = 9_900, 1_000
NUM_SHOTS, NUM_WORDS = 1024, 800


def _store(target: Target, name: str, examples: list[dict[str, Any]]) -> None:
    answer = target.send(post("/v1/support_sets", name=name, examples=examples), timeout=300)
    if answer.status != 200:
        raise BenchFailed(f"a support set was not stored: {answer.status} {answer.body[:500]!r}{answer.error}")


def _store_many(target: Target) -> None:
    for number in range(NUM_SETS):
        _store(target, f"set{number}", [])


def _store_labels(target: Target) -> None:
    _store(target, LARGE, [{"label": f"{number:0{LABEL_CHARACTERS}}"} for number in range(NUM_LABELS)])


def _store_examples(target: Target) -> None:
    _store(target, LARGE, [{"label": f"label {number % 50}", "text": "a"} for number in range(NUM_EXAMPLES)])


def _store_texts(target: Target) -> None:
    _store(
        target, LARGE, [{"label": f"label {number}", "text": "flamingo " * NUM_WORDS} for number in range(NUM_SHOTS)]
    )


def _with_all_shots() -> Request:
    return post(
        "/v1/fewshot/completions",
        examples={"support_set": LARGE, "k": NUM_SHOTS, "strategy": "random"},
        query={"text": f"{random.randrange(10**6)} flamingos"},
        template={"shot": "{text} {label}", "query": "{text}"},
        truncate_shots=True,
        max_tokens=4,
    )


def _requested_at_once(path: str, number: int) -> Callable[..., None]:
    return repeated(*[partial(get, path)] * number, num_connections=number)


ATTACKS = (
    Attack(
        name="64 lists of 1,000 sets",
        severity="high",
        run=_requested_at_once(f"/v1/support_sets?limit={NUM_SETS}", 64),
        prepare=_store_many,
        clean=mixture.clean,
    ),
    Attack(
        name="4 descriptions with 10 MB of labels",
        severity="high",
        run=_requested_at_once(f"/v1/support_sets/{LARGE}", 4),
        prepare=_store_labels,
        clean=mixture.clean,
    ),
    Attack(
        name="16 pages of 10,000 examples",
        severity="medium",
        run=_requested_at_once(f"/v1/support_sets/{LARGE}/examples?limit=1000", 16),
        prepare=_store_examples,
        clean=mixture.clean,
    ),
    Attack(
        name="48 prompts of 1,024 long shots that do not fit",
        severity="high",
        run=repeated(*[_with_all_shots] * 48, num_connections=48),
        prepare=_store_texts,
        clean=mixture.clean,
    ),
    Attack(name="64 scrapes of the metrics", severity="high", run=_requested_at_once("/metrics", 64)),
)
