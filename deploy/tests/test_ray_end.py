"""The end of a fleet on a real Ray: the signal to its command while requests run."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from deploy.ray import drain
from deploy.tests.ray_fleet import REQUEST_SECONDS, STOP_SECONDS, running
from deploy.tests.test_ray import API_KEY, DONE, HEADERS, LONG, Stream, complete

# seconds in which answers of `LONG` tokens end, and no answers of `ENDLESS` ones
SHUTDOWN_SECONDS = 10.0
ENDLESS = 16000


def test_after_a_signal_running_requests_finish_in_time_or_end_with_an_error_and_new_ones_are_refused(
    tmp_path: Path,
) -> None:
    flags = ["--shutdown-timeout", str(SHUTDOWN_SECONDS)]
    with running(tmp_path, {"first": "openflamingo"}, flags, API_KEY) as fleet:
        short, endless, has_begun = Stream(), Stream(), threading.Semaphore(0)
        statuses: list[int] = []
        threads = [
            threading.Thread(target=short.read, args=(fleet.url, LONG, has_begun)),
            threading.Thread(target=endless.read, args=(fleet.url, ENDLESS, has_begun)),
            threading.Thread(target=complete, args=(fleet.url, LONG, statuses)),
        ]
        for thread in threads:
            thread.start()
        for _ in (short, endless):
            assert has_begun.acquire(timeout=REQUEST_SECONDS)
        fleet.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        time.sleep(2)
        assert not short.has_ended
        ready = httpx.get(f"{fleet.url}/health/ready", timeout=REQUEST_SECONDS)
        assert (ready.status_code, ready.json()) == (503, {"status": "shutting_down"})
        body = {"prompt": "a", "max_tokens": 1}
        refused = httpx.post(f"{fleet.url}/v1/completions", json=body, headers=HEADERS, timeout=REQUEST_SECONDS)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        for thread in threads:
            thread.join()
        assert time.monotonic() - began >= SHUTDOWN_SECONDS
        assert fleet.process.wait(STOP_SECONDS) == 0
    assert statuses == [200]
    assert short.error() is None
    error = endless.error()
    assert error is not None
    assert error["code"] == "shutting_down"
    assert all([line for line in stream.lines if line][-1] == DONE for stream in (short, endless))


def test_after_a_second_signal_requests_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def call_all(deployment: str, method: str) -> list[int]:
        calls.append(method)
        return [0, int("fail_requests" not in calls)]

    monkeypatch.setattr(drain, "call_all", call_all)
    hurry = threading.Event()
    threading.Timer(0.3, hurry.set).start()
    began = time.monotonic()
    drain.drain(REQUEST_SECONDS, hurry)
    assert time.monotonic() - began < REQUEST_SECONDS / 2
    assert calls[-2:] == ["fail_requests", "drain"]
