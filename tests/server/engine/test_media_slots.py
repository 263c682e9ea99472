"""The slots of media on the device while sequences read them: held between steps, and released when nothing reads them."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from server.wire import Admitted, MediaWanted, Sampling
from tests.engine_client import CONFIG, Prompt, assert_all_released, assert_equals_reference, client, source

ONE_SLOT = replace(CONFIG, num_media_slots=1, host_media_bytes=0)


def test_an_image_that_is_read_keeps_its_slot_between_steps() -> None:
    """A request of a higher priority, which is served first, does not take the only slot from an answer in progress."""
    answer, first, second = client("openflamingo", ONE_SLOT), Prompt(((0, 6),)), Prompt(((1, 6),))
    sampling = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=0)
    answer.engine.add(first.request("first", sampling))
    while not answer.ids("first"):
        answer.step()
    answer.engine.add(msgspec.structs.replace(second.request("second"), priority=-1))
    while len(answer.ids("first")) < sampling.max_tokens:
        assert answer.engine.gauges()["media_slots_in_use"] == 1
        answer.step()
    answer.run()
    assert answer.requested == [source(0), source(1)]
    assert answer.engine.gauges()["media_evictions"] == 1
    assert_equals_reference("openflamingo", first, answer, "first", sampling.max_tokens)
    assert_equals_reference("openflamingo", second, answer, "second")
    assert_all_released(answer.engine)


def test_images_that_no_later_token_reads_leave_their_slots() -> None:
    """A prompt of more images than slots is computed, image by image."""
    answer, prompt = client("openflamingo", ONE_SLOT), Prompt(((0, 5), (1, 5), (2, 5)))
    answer.engine.add(prompt.request("a"))
    answer.run()
    assert_equals_reference("openflamingo", prompt, answer, "a")
    assert_all_released(answer.engine)


def test_requests_of_lower_priorities_run_by_priority_while_the_first_waits_for_its_image() -> None:
    answer = client("flamingo", ONE_SLOT)
    for image in (0, 1):
        answer.engine.add(Prompt(((image, 5),)).request(str(image)))
        answer.run()
    size = CONFIG.max_tokens_per_step
    for name, priority, shot in (("first", 0, (0, 9)), ("third", 2, (-1, size)), ("second", 1, (-1, 2 * size))):
        answer.engine.add(msgspec.structs.replace(Prompt((shot,)).request(name), priority=priority))
    events = [event for _ in range(5) for event in answer.engine.step()]
    assert MediaWanted(source(0)) in events
    assert [event.request_id for event in events if isinstance(event, Admitted)] == ["second", "third"]
    for event in events:
        answer.take(event)
    answer.run()
    assert_all_released(answer.engine)
