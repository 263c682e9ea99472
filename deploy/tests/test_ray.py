"""A fleet on a real Ray: what clients see, a replica that dies, updates, and several models.

`make test-deploy` runs this. The tests share one fleet, and go from what leaves it as it is to what changes it.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
import psutil
import pytest

from deploy.tests.ray_fleet import REQUEST_SECONDS, START_SECONDS, Fleet, running
from flamboyance_client import Client, Example
from tests.server.api.test_responses import photograph
from tests.server.conftest import data_url, png

CLIENTS = 4
# tokens of an answer that takes some seconds
LONG = 1000
# three checks without an answer, the start of another replica, and the end of a process that reads no messages
HANGS_SECONDS = 180.0
DONE = "data: [DONE]"
API_KEY = "a-key-of-the-fleet"
HEADERS = {"Authorization": f"Bearer {API_KEY}"}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    models = dict.fromkeys(("first", "second", "third", "fourth"), "openflamingo")
    with running(tmp_path_factory.mktemp("fleet"), models, ["--gateways", "1"], API_KEY) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def http(fleet: Fleet) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fleet.url, headers=HEADERS, timeout=REQUEST_SECONDS) as client:
        yield client


@dataclass
class Load:
    """Clients that send one request after the other, and what they got. `name` begins the names of what they store."""

    name: str
    url: str
    failures: list[str] = field(default_factory=list)
    # streams that had begun, and ended with an error event
    cut: list[str] = field(default_factory=list)
    sets: list[str] = field(default_factory=list)
    _end: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[None]:
        clients = [threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        try:
            yield
        finally:
            self._end.set()
            for client in clients:
                client.join()

    def _run(self, client: int) -> None:
        with httpx.Client(base_url=self.url, headers=HEADERS, timeout=REQUEST_SECONDS) as http:
            number = 0
            while not self._end.is_set():
                number += 1
                try:
                    self._send(http, f"{self.name}-{client}-{number}", number)
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))

    def _send(self, http: httpx.Client, name: str, number: int) -> None:
        if number % 3 == 0:
            response = http.post("/v1/support_sets", json={"name": name, "examples": [{"text": name}]})
            self.sets.append(name)
        else:
            fields = {"prompt": name, "max_tokens": 20, "stream": number % 3 == 1}
            response = http.post("/v1/completions", json=fields)
            if fields["stream"] and '"error"' in response.text and response.text.strip().endswith(DONE):
                self.cut.append(response.text)
            elif fields["stream"] and not response.text.strip().endswith(DONE):
                self.failures.append(f"a stream without an end: {response.text[-300:]}")
        if response.status_code != 200:
            self.failures.append(f"{response.status_code} {response.text[-300:]}")

    def lost_sets(self) -> list[str]:
        """Return the support sets that were acknowledged, and are not there."""
        with httpx.Client(base_url=self.url, headers=HEADERS, timeout=REQUEST_SECONDS) as http:
            return [name for name in self.sets if http.get(f"/v1/support_sets/{name}").status_code != 200]


@dataclass
class Stream:
    """A long answer that is read as it comes: the replica that writes it, its lines, and whether it has ended."""

    replica: str = ""
    lines: list[str] = field(default_factory=list)
    has_ended: bool = False

    def read(self, url: str, max_tokens: int, has_begun: threading.Semaphore) -> None:
        body = {"prompt": "a", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        url = f"{url}/v1/completions"
        with httpx.stream("POST", url, json=body, headers=HEADERS, timeout=REQUEST_SECONDS) as response:
            self.replica = response.headers["x-replica"]
            for line in response.iter_lines():
                if not self.lines:
                    has_begun.release()
                self.lines.append(line)
        self.has_ended = True

    def error(self) -> dict[str, Any] | None:
        events = [json.loads(line.removeprefix("data: ")) for line in self.lines if line and line != DONE]
        return next((event["error"] for event in events if "error" in event), None)


def complete(url: str, max_tokens: int, statuses: list[int], seconds: float = REQUEST_SECONDS) -> None:
    body = {"prompt": "a", "max_tokens": max_tokens, "ignore_eos": True}
    response = httpx.post(f"{url}/v1/completions", json=body, headers=HEADERS, timeout=seconds)
    statuses.append(response.status_code)


def test_the_client_works_unchanged(fleet: Fleet) -> None:
    with Client(fleet.url, api_key=API_KEY) as client:
        answer = client.complete("abc", max_tokens=3)
        assert answer.text == "abc"  # what the scripted engine says
        with client.stream("abc", max_tokens=3) as events:
            assert "".join(event.text for event in events) == answer.text
        stored = client.images.upload(png("red"))
        assert client.images.content(stored.id) == png("red")
        large = photograph()  # sent in pieces
        assert client.images.content(client.images.upload(large).id) == large
        examples: list[Example] = [
            {"image": stored.id, "label": "red"},
            {"image": data_url(png("blue")), "label": "blue"},
        ]
        birds = client.support_sets.create(name="client", examples=examples)
        reply = client.fewshot.complete(png("green"), examples={"support_set": birds.id, "k": 2}, max_tokens=1)
        assert len(reply.raw["fewshot"]["shots"]) == 2
        assert {model.id for model in client.models()} == {"first", "second", "third", "fourth"}
        assert client.health().ready


def test_errors_are_those_of_the_server(fleet: Fleet, http: httpx.Client) -> None:
    unauthorized = httpx.get(f"{fleet.url}/v1/models", timeout=REQUEST_SECONDS)
    assert (unauthorized.status_code, unauthorized.json()["error"]["code"]) == (401, "invalid_api_key")
    unknown = http.post("/v1/completions", json={"prompt": "a", "model": "fifth"})
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "model_not_found"
    broken = http.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_value")
    assert len(broken.headers.get_list("x-request-id")) == 1
    large = http.post(
        "/v1/completions", content=iter([b" " * 2**20] * 65), headers={"Content-Type": "application/json"}
    )
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    refused = [line for line in _counted(http.get("/metrics").text).splitlines() if "request_refused_total" in line]
    for code, model in {"invalid_api_key": "", "body_too_large": "", "model_not_found": "first"}.items():
        labels = f'code="{code}",model_name="{model}",tenant="",replica="'
        assert any(labels in line for line in refused), (code, refused)


def test_requests_with_one_support_set_go_to_one_replica_and_sets_are_spread(http: httpx.Client) -> None:
    sets_by_replica: Counter[str] = Counter()
    for number in range(16):  # all on one replica by chance: once in 30,000
        name = f"spread-{number}"
        assert http.post("/v1/support_sets", json={"name": name, "examples": [{"text": "a"}]}).is_success
        body = {
            "examples": {"support_set": name, "k": 1},
            "query": {},
            "max_tokens": 1,
            "template": {"shot": "{text}", "query": "a"},
        }
        replicas = {http.get(f"/v1/support_sets/{name}").headers["x-replica"] for _ in range(3)}
        response = http.post("/v1/fewshot/completions", json=body)
        assert response.is_success, response.text
        replicas.add(response.headers["x-replica"])
        assert len(replicas) == 1
        sets_by_replica.update(replicas)
    assert len(sets_by_replica) == 2


def test_a_client_that_leaves_ends_its_request(fleet: Fleet, http: httpx.Client) -> None:
    with http.stream("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 500, "stream": True}) as response:
        next(response.iter_lines())
    end = time.monotonic() + 10
    while 'finished_reason="abort"' not in _counted(http.get("/metrics").text):
        assert time.monotonic() < end
        time.sleep(0.2)


def _counted(text: str) -> str:
    """Return the samples of metrics whose value is not 0."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("#") and not line.endswith(" 0.0"))


def test_a_replica_that_hangs_hides_neither_readiness_nor_the_metrics_of_the_rest(
    fleet: Fleet, http: httpx.Client
) -> None:
    hung, engine = next(iter(fleet.engines().items()))
    with suspended(psutil.Process(engine).parent()):
        ready = http.get("/health/ready")
        assert (ready.status_code, ready.json()) == (200, {"status": "ready"})
        text = http.get("/metrics").text
        assert len(fleet.replicas()) == 1
        assert f'replica="{hung}"' not in text
        assert "\nflamboyance:replicas_silent 1.0" in text
    assert len(fleet.replicas()) == 2
    assert "\nflamboyance:replicas_silent 0.0" in http.get("/metrics").text


@contextmanager
def suspended(process: psutil.Process | None) -> Iterator[None]:
    assert process is not None
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def test_requests_avoid_a_replica_whose_engine_restarts(fleet: Fleet, http: httpx.Client) -> None:
    psutil.Process(next(iter(fleet.engines().values()))).kill()
    post = partial(http.post, json={"prompt": "a", "max_tokens": 1})
    with ThreadPoolExecutor(8) as pool:  # one replica may answer all requests that follow each other
        responses = list(pool.map(post, ["/v1/completions"] * 64))
    assert [response.status_code for response in responses] == [200] * 64
    assert "flamboyance:requests_repeated_total" in _counted(http.get("/metrics").text)


def test_a_killed_replica_loses_no_request_and_begun_streams_end_with_an_error(
    fleet: Fleet, http: httpx.Client
) -> None:
    load, streams, has_begun = Load("killed", fleet.url), [Stream() for _ in range(6)], threading.Semaphore(0)
    statuses: list[int] = []
    threads = [threading.Thread(target=stream.read, args=(fleet.url, LONG, has_begun)) for stream in streams]
    threads += [threading.Thread(target=complete, args=(fleet.url, LONG, statuses)) for _ in streams]
    engines = fleet.engines()
    with load.running():
        for thread in threads:
            thread.start()
        for _ in streams:
            assert has_begun.acquire(timeout=REQUEST_SECONDS)
        # not any replica: the router may have sent all streams to one
        victim = next(stream.replica for stream in streams if not stream.has_ended)
        fleet.kill(engines[victim])
        for thread in threads:
            thread.join()
        time.sleep(2)
    assert load.failures == []
    assert load.lost_sets() == []
    assert statuses == [200] * len(streams)
    assert all([line for line in stream.lines if line][-1] == DONE for stream in streams)
    errors = [error for stream in streams if (error := stream.error()) is not None]
    assert errors
    assert {error["code"] for error in errors} == {"replica_lost"}


def test_a_replica_that_hangs_is_replaced_and_its_requests_are_sent_again(fleet: Fleet) -> None:
    engines, statuses = fleet.engines(), list[int]()
    hung, engine = next(iter(engines.items()))
    process = psutil.Process(engine).parent()
    assert process is not None
    process.suspend()
    began = time.monotonic()
    threads = [threading.Thread(target=complete, args=(fleet.url, 1, statuses, HANGS_SECONDS)) for _ in range(6)]
    for thread in threads:
        thread.start()
    while hung in (replicas := fleet.replicas()) or len(replicas) < len(engines):
        assert time.monotonic() - began < HANGS_SECONDS, replicas
        time.sleep(1)
    replaced = time.monotonic() - began
    for thread in threads:
        thread.join()
    print(f"replaced after {replaced:.0f} s, requests answered after {time.monotonic() - began:.0f} s")
    assert statuses == [200] * len(threads)


def test_an_update_of_a_fleet_at_another_address_is_refused(fleet: Fleet) -> None:
    other, log = copy(fleet), fleet.folder / "other.log"
    other.port += 1
    with log.open("w") as file:
        assert other.start(file, "update", "--address", fleet.address).wait(START_SECONDS) == 2
    assert f"error: the fleet on this Ray is at 127.0.0.1:{fleet.port}, and not at" in log.read_text()


def test_a_rolling_update_replaces_every_replica_and_loses_no_request(fleet: Fleet) -> None:
    before, load = fleet.replicas(), Load("rolling", fleet.url)
    with load.running():
        fleet.update("--replicas", "2", "--generation", "2")
        time.sleep(1)
    assert load.failures == []
    assert load.cut == []
    assert load.lost_sets() == []
    after = fleet.replicas()
    assert len(after) == 2
    assert not before.keys() & after.keys()


def test_an_update_of_a_limit_reaches_the_gateways_and_loses_no_request(fleet: Fleet, http: httpx.Client) -> None:
    large = {"prompt": "a" * 2**20, "max_tokens": 1}
    assert http.post("/v1/completions", json=large).json()["error"]["code"] == "context_length_exceeded"
    limited, load = ["--replicas", "2", "--generation", "2", "--max-body-mb", "1"], Load("limits", fleet.url)
    with load.running():
        fleet.update(*limited)
        time.sleep(1)
    assert load.failures == []
    assert load.cut == []
    assert load.lost_sets() == []
    refused = http.post("/v1/completions", json=large)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
    assert "x-replica" not in refused.headers  # the gateway's answer
    fleet.update("--replicas", "2", "--generation", "2")
    assert http.post("/v1/completions", json=large).json()["error"]["code"] == "context_length_exceeded"


def test_a_model_is_loaded_on_first_use_and_the_one_used_least_recently_makes_room(
    fleet: Fleet, http: httpx.Client
) -> None:
    def use(model: str) -> str:
        response = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "model": model})
        assert (response.status_code, response.json().get("model")) == (200, model)
        return response.headers["x-replica"]

    assert list(fleet.replicas().values()) == [{"first"}, {"first"}]
    homes = {model: use(model) for model in ("second", "third")}
    assert homes["second"] != homes["third"]  # to the replica with the fewest models
    assert use("second") == homes["second"]
    replica = use("fourth")
    assert fleet.replicas()[replica] == {"fourth", *(model for model in homes if homes[model] == replica)}


def test_a_model_is_replaced_without_a_restart(fleet: Fleet, http: httpx.Client) -> None:
    replicas, before, load = fleet.replicas(), fleet.engines(), Load("replaced", fleet.url)
    fleet.models(first="flamingo", second="openflamingo")
    with load.running():
        fleet.update("--replicas", "2", "--generation", "2")
    assert load.failures == []
    assert load.cut == []
    assert fleet.replicas().keys() == replicas.keys()
    after = fleet.engines()
    assert not set(after.values()) & set(before.values())
    models = {model["id"]: model["root"] for model in http.get("/v1/models").json()["data"]}
    assert models == {"first": "tiny-flamingo", "second": "tiny-openflamingo"}
    assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).json()["model"] == "first"
