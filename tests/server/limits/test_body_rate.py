"""Large bodies are read at a limited rate while requests wait or run, and as fast as they come otherwise."""

from __future__ import annotations

import httpx
import pytest

from server.api.body import LARGE_BODY
from server.limits.admission import BYTES_PER_SECOND, MIN_PAUSE, Admission, BodyRate, Ticket
from server.settings import Settings
from server.telemetry.metrics import Metrics
from tests.server.fakes import AS_JSON

PIECE = 2**16


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_bodies_that_come_fast_are_read_at_the_rate_of_all_together() -> None:
    clock = Clock()
    rate, num_pauses = BodyRate(clock), 0
    for _ in range(BYTES_PER_SECOND // PIECE):
        pause = rate.pause(PIECE)
        num_pauses += pause > 0
        clock.now += pause
    assert clock.now - 100 == pytest.approx(1, abs=MIN_PAUSE)
    assert num_pauses < 1 / MIN_PAUSE


def test_a_body_that_comes_slowly_is_not_paused() -> None:
    clock = Clock()
    rate = BodyRate(clock)
    for _ in range(100):
        assert rate.pause(PIECE) == 0
        clock.now += 2 * PIECE / BYTES_PER_SECOND


def test_nothing_is_paused_while_no_client_has_a_request() -> None:
    clock = Clock()
    admission = Admission(4, Metrics("tiny"), clock=clock)
    with admission.ticket("a") as ticket, admission.ticket("b") as reading:
        assert reading.pause(BYTES_PER_SECOND) == 0
        ticket.wait()
        assert reading.pause(BYTES_PER_SECOND) == pytest.approx(1)


class TestServer:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"max_body_mb": 8})

    @pytest.mark.anyio
    async def test_the_bytes_of_large_bodies_are_counted(
        self, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counted = list[int]()

        def pause(ticket: Ticket, num_bytes: int) -> float:
            counted.append(num_bytes)
            return 0.0

        monkeypatch.setattr(Ticket, "pause", pause)
        for size in (LARGE_BODY, 4 * LARGE_BODY):
            body = b'{"prompt": "x"}'.ljust(size)
            assert (await http.post("/v1/completions", headers=AS_JSON, content=body)).status_code == 200
        assert counted == [4 * LARGE_BODY]
