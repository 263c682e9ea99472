"""The engine against the oracle: greedy tokens and log-probabilities equal `model.reference`, whatever else runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.inference import prepare_for_inference
from model.reference import encode, generate, log_probs
from server.engine.engine import Engine
from server.wire import Abort, Finished, Generate, MediaFailed, MediaWanted, Sampling
from tests.engine_client import (
    CONFIG,
    FEW_SHOT,
    GREEDY,
    IMAGE_TOKEN,
    IMAGES,
    MODELS,
    Client,
    Prompt,
    assert_all_released,
    assert_equals_reference,
    client,
    frames,
    source,
)
from tests.tiny_models import CONFIGS, FAMILIES, Family, prompt_tokenizer, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_one_few_shot_prompt(family: Family) -> None:
    answer = client(family)
    answer.engine.add(FEW_SHOT.request("a"))
    answer.run()
    assert_equals_reference(family, FEW_SHOT, answer, "a")
    assert_all_released(answer.engine)


def test_the_ablation_that_reads_all_previous_media() -> None:
    config = CONFIGS["flamingo"]
    config = replace(config, gated=replace(config.gated, attends="all_previous"))
    model, served = tiny_model(config), prepare_for_inference(tiny_model(config))
    answer = Client(Engine(served, prompt_tokenizer(), CONFIG), dict(IMAGES))
    request = FEW_SHOT.request("a")
    answer.engine.add(request)
    answer.run()
    pixels = FEW_SHOT.pixels(model)
    expected = generate(
        model, request.prompt.token_ids, request.prompt.media_index, pixels, max_tokens=6, suppressed_ids=[IMAGE_TOKEN]
    )
    assert answer.ids("a") == expected.token_ids
    answer.engine.add(FEW_SHOT.request("cached"))
    answer.run()
    assert answer.admitted["cached"].cached_tokens > 0
    assert answer.ids("cached") == expected.token_ids
    assert_all_released(answer.engine)


prompts = st.lists(st.tuples(st.integers(-1, 5), st.integers(1, 12)), min_size=1, max_size=6).map(
    lambda shots: Prompt(tuple(shots))
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_mix_of_requests(family: Family, data: st.DataObject) -> None:
    """Random prompts that share media, tiny pools that force preemption and eviction, small steps, arrivals, aborts."""
    config = replace(
        CONFIG,
        block_size=data.draw(st.sampled_from([1, 3, 4])),
        num_blocks=data.draw(st.integers(128, 140)),
        num_media_slots=data.draw(st.integers(2, 5)),
        max_tokens_per_step=data.draw(st.integers(8, 40)),
        max_sequences=data.draw(st.integers(1, 8)),
        host_media_bytes=data.draw(st.sampled_from([0, 600, 1 << 20])),
    )
    if config.block_size > 1:
        config = replace(config, num_blocks=-(-config.max_model_len // config.block_size))
    requested = data.draw(st.lists(prompts, min_size=1, max_size=6))
    aborted = data.draw(st.sets(st.integers(0, len(requested) - 1), max_size=2))
    answer = client(family, config)
    for i, prompt in enumerate(requested):
        answer.engine.add(prompt.request(str(i)))
        for _ in range(data.draw(st.integers(0, 3))):
            answer.step()
        if i in aborted:
            answer.engine.abort(Abort(str(i)))
    answer.run()
    for i, prompt in enumerate(requested):
        if i not in aborted:
            assert_equals_reference(family, prompt, answer, str(i))
    assert_all_released(answer.engine)


@pytest.mark.parametrize("family", FAMILIES)
def test_few_blocks_force_preemption(family: Family) -> None:
    config = replace(CONFIG, num_blocks=10, max_model_len=40)
    answer = client(family, config)
    sampling = Sampling(max_tokens=16, temperature=0.0, ignore_eos=True, logprobs=0)
    requested = [Prompt(((image, 6),)) for image in range(4)]
    for i, prompt in enumerate(requested):
        answer.engine.add(prompt.request(str(i), sampling))
    answer.run()
    assert answer.engine.residents.num_preemptions > 0
    for i, prompt in enumerate(requested):
        assert_equals_reference(family, prompt, answer, str(i), sampling.max_tokens)
    assert_all_released(answer.engine)


def test_prompt_log_probabilities_equal_the_reference() -> None:
    answer = client("openflamingo", replace(CONFIG, max_tokens_per_step=7))
    request = FEW_SHOT.request("a", Sampling(max_tokens=0, prompt_logprobs=2))
    answer.engine.add(request)
    answer.run()
    model = MODELS["openflamingo"]
    expected = log_probs(
        model, request.prompt.token_ids, request.prompt.media_index, encode(model, FEW_SHOT.pixels(model))
    )
    scored = answer.scores["a"].logprobs
    assert scored[0] is None
    assert len(scored) == len(request.prompt.token_ids)
    for position, score in enumerate(scored[1:]):
        assert score is not None
        assert score.token_id == request.prompt.token_ids[position + 1]
        assert score.logprob == pytest.approx(float(expected[position, score.token_id]), abs=1e-4)
        best = expected[position].topk(2)
        assert [i for i, _ in score.top] == best.indices.tolist()
    assert answer.finished["a"].finish_reason == "length"
    assert not answer.tokens


def test_prompt_and_output_fed_back_have_the_same_log_probabilities() -> None:
    answer = client("idefics")
    request = FEW_SHOT.request("a")
    answer.engine.add(request)
    answer.run()
    ids = answer.ids("a")
    whole = Generate(
        request_id="b",
        prompt=request.prompt.followed_by(ids),
        sampling=Sampling(max_tokens=0, prompt_logprobs=0),
    )
    answer.engine.add(whole)
    answer.run()
    again = [score.logprob for score in answer.scores["b"].logprobs[-len(ids) :] if score is not None]
    before = [token.logprob.logprob for token in answer.tokens["a"] if token.logprob is not None]
    assert again == pytest.approx(before, abs=1e-4)


def test_a_repeated_prompt_is_cached() -> None:
    answer = client("openflamingo")
    answer.engine.add(FEW_SHOT.request("cold"))
    answer.run()
    answer.requested.clear()
    answer.engine.add(FEW_SHOT.request("warm"))
    answer.run()
    assert answer.requested == []
    assert (answer.admitted["cold"].media_encoded, answer.admitted["cold"].cached_tokens) == (4, 0)
    warm = answer.admitted["warm"]
    assert (warm.media_encoded, warm.media_cached) == (0, 4)
    assert (
        warm.cached_tokens == (len(FEW_SHOT.request("x").prompt.token_ids) - 1) // CONFIG.block_size * CONFIG.block_size
    )
    assert_equals_reference("openflamingo", FEW_SHOT, answer, "warm")


@pytest.mark.parametrize("family", FAMILIES)
def test_concurrent_prompts_are_computed_once(family: Family) -> None:
    answer, length = client(family), len(FEW_SHOT.request("x").prompt.token_ids)
    whole_blocks = (length - 1) // CONFIG.block_size * CONFIG.block_size
    for i in range(4):
        answer.engine.add(FEW_SHOT.request(str(i)))
    answer.run()
    assert [answer.admitted[str(i)].cached_tokens for i in range(4)] == [0] + 3 * [whole_blocks]
    for i in range(4):
        assert_equals_reference(family, FEW_SHOT, answer, str(i))
    assert_all_released(answer.engine)


def test_a_sequence_continues_if_the_one_that_computes_its_block_is_aborted() -> None:
    answer = client("openflamingo", replace(CONFIG, max_tokens_per_step=CONFIG.block_size))
    for name in ("first", "second"):
        answer.engine.add(FEW_SHOT.request(name))
    while "first" not in answer.admitted:
        answer.step()
    answer.engine.abort(Abort(request_id="first"))
    answer.run()
    assert_equals_reference("openflamingo", FEW_SHOT, answer, "second")
    assert_all_released(answer.engine)


def test_another_order_reuses_media_but_not_text() -> None:
    answer = client("openflamingo")
    answer.engine.add(FEW_SHOT.request("a"))
    answer.run()
    answer.requested.clear()
    reordered = Prompt(((3, 5), (1, 4), (0, 9)))
    answer.engine.add(reordered.request("b"))
    answer.run()
    assert answer.requested == []
    assert answer.admitted["b"].media_cached == 3
    assert_equals_reference("openflamingo", reordered, answer, "b")


def test_the_same_text_with_another_image_is_another_prefix() -> None:
    answer = client("flamingo")
    for i, image in enumerate((0, 1)):
        request = Prompt(((0, 11), (2, 3))).request(str(i))
        media = [source(image), source(2)]
        answer.engine.add(msgspec.structs.replace(request, prompt=replace(request.prompt, media=media)))
        answer.run()
    assert answer.admitted["1"].cached_tokens == 0
    assert answer.tokens["0"][0].logprob != answer.tokens["1"][0].logprob


def test_two_encodings_of_one_image_share_a_slot() -> None:
    answer = client("flamingo")
    answer.engine.add(Prompt(((0, 9),)).request("png"))
    answer.run()
    answer.engine.add(Prompt(((0, 9),)).request("webp", encoding=1))
    answer.run()
    assert answer.requested == [source(0), source(0, 1)]
    assert answer.admitted["webp"].media_cached == 1
    assert answer.admitted["webp"].cached_tokens == 8
    assert answer.engine.media.slots.num_slots - len(answer.engine.media.slots._free) == 1


def test_an_evicted_page_comes_back_from_the_host_without_pixels() -> None:
    answer = client("idefics", replace(CONFIG, num_media_slots=2))
    for i in range(4):
        answer.engine.add(Prompt(((i, 5),)).request(str(i)))
        answer.run()
    assert answer.engine.media.slots.find(answer.engine.media.content_keys.get(source(0)) or b"") is None
    answer.requested.clear()
    again = Prompt(((0, 7),))
    answer.engine.add(again.request("again"))
    answer.run()
    assert answer.requested == []
    assert_equals_reference("idefics", again, answer, "again")


def test_common_media_are_requested_once() -> None:
    answer = client("flamingo")
    for i in range(5):
        answer.engine.add(Prompt(((0, 5), (1, i + 1))).request(str(i)))
    answer.run()
    assert sorted(answer.requested) == sorted([source(0), source(1)])


def test_failed_media_fail_only_their_requests() -> None:
    answer = client("flamingo")
    bad = b"?" * 32
    good = Prompt(((0, 5),))
    request = good.request("bad")
    answer.engine.add(good.request("good"))
    answer.engine.add(
        Generate(
            request_id="bad",
            prompt=replace(request.prompt, media=[bad]),
            sampling=GREEDY,
        )
    )
    answer.images[bad] = frames(0)
    for event in answer.engine.step():
        if event != MediaWanted(bad):
            answer.take(event)
    answer.engine.fail_media(MediaFailed(digest=bad, message="not an image"))
    answer.run()
    assert answer.finished["bad"] == Finished(request_id="bad", finish_reason="error", error="not an image")
    assert_equals_reference("flamingo", good, answer, "good")
    assert_all_released(answer.engine)


def test_a_sequence_that_waits_does_not_delay_others() -> None:
    answer = client("flamingo")
    held_back = b"!" * 32
    request = Prompt(((0, 5),)).request("slow")
    answer.engine.add(
        Generate(
            request_id="slow",
            prompt=replace(request.prompt, media=[held_back]),
            sampling=GREEDY,
        )
    )
    answer.engine.step()
    assert answer.engine.is_waiting_for_media()
    answer.engine.add(Prompt(((1, 5),)).request("fast"))
    assert not answer.engine.is_waiting_for_media()
    for _ in range(20):
        answer.step()
    assert len(answer.ids("fast")) == 6
    answer.engine.abort(Abort("slow"))
    answer.run()
    assert answer.finished["slow"].finish_reason == "abort"
    assert_all_released(answer.engine)


def test_nan_logits_fail_one_request_and_freed_pages_do_not_leak() -> None:
    """Poison all blocks and pages without an owner before each step, so that a read of them would fail the test."""
    answer = client("openflamingo")
    engine = answer.engine
    for i in range(3):
        answer.engine.add(Prompt(((i, 9), (i + 1, 4))).request(str(i)))
    while engine.has_work():
        used = {b for s in engine.scheduler.running for b in s.block_table}
        published = set(engine.blocks._hash_of)
        free = [b for b in range(engine.blocks.num_blocks) if b not in used | published]
        engine.runner._kv.blocks[:, free] = torch.nan
        engine.runner._media.pages[engine.media.slots._free] = torch.nan
        answer.step()
    for i in range(3):
        assert_equals_reference("openflamingo", Prompt(((i, 9), (i + 1, 4))), answer, str(i))
    engine.runner._kv.blocks[:] = torch.nan
    engine.blocks.clear_cache()
    engine.runner._media.pages[:] = torch.nan
    answer.engine.add(Prompt(((0, 3),)).request("poisoned"))
    answer.run()
    assert answer.finished["poisoned"].error == "the model's output is not finite"
    assert_all_released(engine)


def test_a_crowd_does_not_change_an_answer() -> None:
    alone = client("idefics")
    alone.engine.add(FEW_SHOT.request("a"))
    alone.run()
    crowd = client("idefics", replace(CONFIG, num_blocks=400, max_sequences=16, num_media_slots=16))
    for i in range(15):
        crowd.engine.add(Prompt(((i % 6, 3 + i), ((i + 1) % 6, 4))).request(str(i)))
    crowd.engine.add(FEW_SHOT.request("a"))
    crowd.run()
    assert crowd.ids("a") == alone.ids("a")
    for token, crowd_token in zip(alone.tokens["a"], crowd.tokens["a"], strict=True):
        assert token.logprob is not None
        assert crowd_token.logprob is not None
        assert token.logprob.logprob == pytest.approx(crowd_token.logprob.logprob, abs=1e-4)


def sampled(seed: int, crowd: Sequence[int] = ()) -> list[int]:
    answer = client("flamingo")
    hot = Sampling(max_tokens=12, temperature=1.3, top_p=0.95, seed=seed, ignore_eos=True)
    answer.engine.add(FEW_SHOT.request("a", hot))
    for i in crowd:
        answer.engine.add(Prompt(((i % 6, 5),)).request(str(i), Sampling(max_tokens=9, ignore_eos=True)))
    answer.run()
    return answer.ids("a")


def test_a_seed_gives_the_same_tokens_in_any_batch() -> None:
    assert sampled(3) == sampled(3, range(6))
    assert sampled(3) != sampled(4)


def test_a_stop_token_stops() -> None:
    answer = client("flamingo")
    free = Sampling(max_tokens=10, temperature=0.0, ignore_eos=True)
    answer.engine.add(FEW_SHOT.request("free", free))
    answer.run()
    third = answer.ids("free")[2]
    first = answer.ids("free").index(third)
    stop = Sampling(max_tokens=10, temperature=0.0, stop_token_ids=(third,), ignore_eos=True)
    answer.engine.add(FEW_SHOT.request("stop", stop))
    answer.run()
    assert answer.ids("stop") == answer.ids("free")[: first + 1]
    assert answer.tokens["stop"][-1].finish_reason == "stop"
    assert answer.tokens["free"][-1].finish_reason == "length"


def test_eos_stops_and_is_ignored_on_demand() -> None:
    answer = client("flamingo")
    eos = min(answer.engine._eos_ids)
    always = Sampling(max_tokens=4, temperature=0.0, logit_bias={eos: 100.0})
    answer.engine.add(FEW_SHOT.request("stop", always))
    answer.engine.add(FEW_SHOT.request("ignore", msgspec.structs.replace(always, ignore_eos=True)))
    answer.run()
    assert (answer.ids("stop"), answer.tokens["stop"][-1].finish_reason) == ([eos], "stop")
    assert (answer.ids("ignore"), answer.tokens["ignore"][-1].finish_reason) == ([eos] * 4, "length")


def test_a_request_that_is_too_long_is_refused_with_both_numbers() -> None:
    answer = client("flamingo")
    answer.engine.add(Prompt(((-1, 120),)).request("long", Sampling(max_tokens=20)))
    answer.run()
    assert "120 prompt tokens and max_tokens 20 exceed max_model_len 128" in answer.finished["long"].error


def test_requests_are_admitted_by_priority() -> None:
    answer = client("flamingo", replace(CONFIG, max_sequences=1))
    for name, priority in (("late", 5), ("early", -1)):
        request = Prompt(((0, 5),)).request(name)
        fields = {f: getattr(request, f) for f in request.__struct_fields__}
        answer.engine.add(Generate(**{**fields, "priority": priority}))
    answer.run()
    assert list(answer.admitted) == ["early", "late"]
