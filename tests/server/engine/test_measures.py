"""The engine counts steps by kind, frames, host hits, and joins of media that are on their way."""

from __future__ import annotations

from dataclasses import replace

import pytest

from server.telemetry.measures import ENGINE_HISTOGRAMS, STEP_FRAMES, STEP_SECONDS, STEP_TOKENS
from server.wire import Encoded, Outbound, Sampling
from tests.engine_client import CONFIG, Prompt, client


def test_the_steps_of_a_request_are_counted_with_their_tokens_and_frames() -> None:
    answer, prompt = client("openflamingo"), Prompt(((0, 6), (1, 6)))
    request = prompt.request("a", Sampling(max_tokens=5, temperature=0.0, ignore_eos=True))
    answer.engine.add(request)
    answer.run()
    histograms = answer.engine.histograms()
    assert histograms.keys() == ENGINE_HISTOGRAMS.keys()
    steps = {kind: sum(counts) for kind, (*counts, _) in histograms[STEP_SECONDS].items()}
    assert steps["decode"] == 4  # the prompt's last step gives the first of the five tokens
    assert steps["prompt"] >= 1
    assert steps["mixed"] == 0
    *_, num_tokens = histograms[STEP_TOKENS][""]
    assert num_tokens == len(request.prompt.token_ids) + 4
    *_, num_frames = histograms[STEP_FRAMES][""]
    assert num_frames == 2
    assert all(seconds > 0 for kind, (*_, seconds) in histograms[STEP_SECONDS].items() if steps[kind])


@pytest.mark.parametrize(("is_traced", "num_frames"), [(True, 2), (False, 0)])
def test_encoding_is_reported_if_requests_are_traced(is_traced: bool, num_frames: int) -> None:
    answer = client("openflamingo", replace(CONFIG, reports_encoding=is_traced))
    answer.engine.add(Prompt(((0, 6), (1, 6))).request("a"))
    messages: list[Outbound] = []
    while answer.engine.has_work():
        for message in answer.engine.step():
            messages.append(message)
            answer.take(message)
    reports = [message for message in messages if isinstance(message, Encoded)]
    assert sum(report.num_frames for report in reports) == num_frames
    assert all((report.request_id, report.seconds > 0) == ("a", True) for report in reports)
    assert answer.ids("a")


def test_a_page_from_host_memory_is_a_host_hit() -> None:
    answer = client("idefics", replace(CONFIG, num_media_slots=2))
    for image in range(4):
        answer.engine.add(Prompt(((image, 5),)).request(str(image)))
        answer.run()
    assert answer.engine.gauges()["media_host_hits"] == 0
    answer.engine.add(Prompt(((0, 7),)).request("again"))
    answer.run()
    assert answer.engine.gauges()["media_host_hits"] == 1


def test_a_request_for_media_that_are_on_their_way_joins_the_first() -> None:
    answer = client("flamingo")
    for index in range(3):
        answer.engine.add(Prompt(((0, 5), (1, index + 1))).request(str(index)))
    answer.run()
    assert answer.engine.gauges()["media_single_flight_joins"] == 4  # two media of the second and of the third request
    answer.engine.add(Prompt(((0, 9),)).request("later"))
    answer.run()
    assert answer.engine.gauges()["media_single_flight_joins"] == 4


def test_a_page_has_the_bytes_of_its_keys_and_values() -> None:
    engine = client("openflamingo").engine
    gauges, pages = engine.gauges(), engine.runner._media.pages
    assert gauges["media_page_bytes"] * gauges["media_slots"] == pages.nbytes
