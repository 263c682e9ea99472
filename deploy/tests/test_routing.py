"""Tests of pure functions, without Ray: the choice of a replica, repeated requests, the metrics of all."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.ray.affinity import FREE_REQUESTS, affinity_key, bound, preferred, ranked
from deploy.ray.call import Call
from deploy.ray.exposition import labelled, merge
from deploy.ray.replay import KEY, may_repeat, with_key
from server.telemetry.metrics import Metrics

REPLICAS = [f"r{index}" for index in range(5)]
KEYS = [f"set-{index}" for index in range(2000)]


def image(name: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{name}"}}


def call(method: str, path: str, **fields: Any) -> Call:
    defaults: dict[str, Any] = {
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": (),
        "client": None,
        "body": b"",
    }
    return Call(method=method, path=path, scheme="http", **{**defaults, **fields})


def test_keys_are_spread_evenly() -> None:
    counts = Counter(ranked(key, REPLICAS)[0] for key in KEYS)
    assert all(len(KEYS) / 5 * 0.8 < counts[replica] < len(KEYS) / 5 * 1.2 for replica in REPLICAS)


def test_only_the_keys_of_a_replica_that_leaves_move() -> None:
    left = REPLICAS[:-1]
    moved = [key for key in KEYS if ranked(key, REPLICAS)[0] != ranked(key, left)[0]]
    assert all(ranked(key, REPLICAS)[0] == REPLICAS[-1] for key in moved)
    assert {ranked(key, left)[0] for key in moved} == set(left)


def test_an_idle_fleet_serves_a_key_where_it_lives() -> None:
    assert all(preferred(key, dict.fromkeys(REPLICAS, 0)) == ranked(key, REPLICAS) for key in KEYS[:50])


def test_no_replica_has_more_than_the_bound_while_requests_arrive() -> None:
    loads, rng = dict.fromkeys(REPLICAS, 0), random.Random(0)
    for _ in range(400):
        # a single key is as popular as all others together
        key = KEYS[0] if rng.random() < 0.5 else rng.choice(KEYS)
        limit = bound(loads)
        loads[preferred(key, loads)[0]] += 1
        assert max(loads.values()) <= limit
    assert max(loads.values()) <= 1.25 * 400 / 5 + 1


def test_a_busy_replica_comes_last_and_others_keep_their_order() -> None:
    first, *rest = ranked("a", REPLICAS)
    assert preferred("a", {**dict.fromkeys(REPLICAS, 0), first: FREE_REQUESTS}) == [*rest, first]


@pytest.mark.parametrize(
    ("path", "body", "key"),
    [
        ("/v1/support_sets/birds/search", None, "birds"),
        ("/v1/support_sets/birds", {"pinned": True}, "birds"),
        ("/v1/support_sets", {"name": "birds", "examples": []}, "birds"),
        ("/v1/support_sets/import", None, None),
        ("/v1/fewshot/completions", {"examples": {"support_set": "birds", "k": 4}, "query": {"image": "a"}}, "birds"),
        ("/v1/completions", {"prompt": "a text"}, None),
        ("/v1/support_sets", None, None),
        ("/health", None, None),
    ],
)
def test_the_key_is_the_support_set(path: str, body: dict[str, Any] | None, key: str | None) -> None:
    assert affinity_key(path, body) == key


def test_prompts_with_the_same_shots_have_the_same_key_whatever_they_ask() -> None:
    text = {"type": "text", "text": "a"}
    prompts = [[image("x"), text, image("y"), text, image(query)] for query in ("q1", "q2")]
    keys = {affinity_key("/v1/completions", {"prompt": prompt}) for prompt in prompts}
    messages = [{"role": "user", "content": prompts[0]}]
    keys.add(affinity_key("/v1/chat/completions", {"messages": messages}))
    assert len(keys) == 1
    assert keys != {None}


def test_the_query_of_a_few_shot_request_does_not_count_wherever_it_stands() -> None:
    shots = [{"image": "data:image/png;base64,x", "label": "a"}]
    queries = [{"image": f"data:image/png;base64,{name}"} for name in "qr"]
    bodies = [{"query": queries[0], "shots": shots}, {"shots": shots, "query": queries[1]}]
    assert affinity_key("/v1/classify", bodies[0]) == affinity_key("/v1/classify", bodies[1])
    assert affinity_key("/v1/classify", {"query": queries[0]}) != affinity_key("/v1/classify", {"query": queries[1]})


def test_named_media_have_one_key_with_and_without_their_data() -> None:
    parts = [image("x") | {"uuid": "flamingo"}, {"type": "image_url", "uuid": "flamingo"}]
    assert len({affinity_key("/v1/completions", {"prompt": [part]}) for part in parts}) == 1


def test_a_body_may_be_as_deep_as_the_parser_permits() -> None:
    nested: Any = [image("x")]
    for _ in range(5000):
        nested = [nested]
    assert affinity_key("/v1/completions", {"prompt": nested}) == affinity_key(
        "/v1/completions", {"prompt": [image("x")]}
    )


def test_prompts_that_share_most_of_their_pictures_mostly_have_the_same_key() -> None:
    rng, same = random.Random(0), 0
    for _ in range(300):
        shots = [str(rng.random()) for _ in range(8)]
        other = [*shots[:7], str(rng.random())]
        keys = {
            affinity_key("/v1/completions", {"prompt": [image(name) for name in [*s, "query"]]}) for s in (shots, other)
        }
        same += len(keys) == 1
    assert abs(same / 300 - 7 / 9) < 0.08  # the part that both have of all


@pytest.mark.parametrize(
    ("method", "path", "fields", "expected"),
    [
        ("GET", "/v1/support_sets", {}, True),
        ("POST", "/v1/completions", {}, True),
        ("POST", "/v1/images", {}, True),
        ("POST", "/v1/support_sets", {}, True),
        ("POST", "/v1/support_sets/birds/evaluate", {}, False),
        ("DELETE", "/v1/support_sets/birds", {}, True),
        ("DELETE", "/v1/support_sets/birds", {"query_string": b"expected_version=2"}, False),
        ("DELETE", "/v1/support_sets/birds", {"query_string": b"expected%5Fversion=2"}, False),
        ("PATCH", "/v1/support_sets/birds", {"body": b'{"expected_version": 2}'}, False),
        ("PATCH", "/v1/support_sets/birds", {"body": b'{"expected\\u005fversion": 2}'}, False),
        ("PATCH", "/v1/support_sets/birds", {"body": b'{"name": "expected_version"}'}, True),
        ("PATCH", "/v1/support_sets/birds", {"body": b"not JSON"}, False),
    ],
)
def test_a_request_may_be_repeated_unless_that_could_do_it_twice(
    method: str, path: str, fields: dict[str, Any], expected: bool
) -> None:
    assert may_repeat(call(method, path, **fields)) == expected


def test_what_makes_something_gets_a_key_unless_it_has_one() -> None:
    headers = ((KEY, b"mine"),)
    for path in ("/v1/support_sets", "/v1/support_sets/import", "/v1/support_sets/birds/examples"):
        (added,) = with_key(call("POST", path)).headers
        assert added[0] == KEY
        assert with_key(call("POST", path, headers=headers)).headers == headers
    for method, path in (("GET", "/v1/support_sets"), ("POST", "/v1/completions")):
        assert with_key(call(method, path)).headers == ()


def test_each_sample_names_its_replica_and_no_metric_is_described_twice() -> None:
    text = b'# HELP a_total A.\n# TYPE a_total counter\na_total{model_name="m"} %d.0\n'
    merged = merge([labelled(text % 1, "x"), labelled(text % 2, "y")]).decode()
    assert merged.count("# TYPE") == merged.count("# HELP") == 1
    assert 'a_total{model_name="m",replica="x"} 1.0' in merged
    assert 'a_total{model_name="m",replica="y"} 2.0' in merged


def samples(text: bytes) -> list[tuple[str, dict[str, str], float]]:
    families = text_string_to_metric_families(text.decode())
    return [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]


def test_no_sample_is_lost_or_changed_whatever_its_labels() -> None:
    texts = [measured(name).expose(with_vllm_names=True) for name in ("m", 'a "} 1\n# HELP b \\', "{,}")]
    registry = prometheus_client.CollectorRegistry()
    prometheus_client.Counter("own", "Without labels.", registry=registry).inc()
    texts.append(prometheus_client.generate_latest(registry))
    merged = merge(labelled(text, replica) for replica in "xy" for text in texts)
    expected = [
        (name, {**labels, "replica": replica}, value)
        for replica in "xy"
        for text in texts
        for name, labels, value in samples(text)
    ]
    assert sorted(samples(merged), key=repr) == sorted(expected, key=repr)
    described = [line for line in merged.splitlines() if line.startswith(b"# TYPE")]
    assert len(described) == len(set(described))


def measured(model: str) -> Metrics:
    """Return the metrics of a server that has refused a request and answered another one."""
    metrics = Metrics(model)
    metrics.count_refused("overloaded", "acme")
    metrics.time_to_first_token.observe(0.2)
    return metrics


def test_the_metrics_of_a_large_fleet_are_merged_within_a_moment() -> None:
    """A gateway merges them in its event loop, so all its requests wait as long."""
    texts = [labelled(measured("m").expose(), f"r{number}") for number in range(64)]
    assert min(seconds(partial(merge, texts)) for _ in range(3)) < 0.1


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
