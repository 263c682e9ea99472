"""A device that computes nonfinite values once: the request in that step fails, and none of its values is used again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.batch import Batch
from model.inference import prepare_for_inference
from server.engine.engine import Engine
from server.wire import Abort, MediaFailed, MediaWanted, Sampling
from tests.engine_client import (
    CONFIG,
    FEW_SHOT,
    IMAGES,
    Client,
    Prompt,
    assert_all_released,
    assert_equals_reference,
    client,
    source,
)
from tests.tiny_models import CONFIGS, FAMILIES, Family, prompt_tokenizer, tiny_model

NOT_FINITE = "the model's output is not finite"
SMALL_STEPS = replace(CONFIG, max_tokens_per_step=8)
NUM_STEPS = 4  # that FEW_SHOT's prompt takes in these; then it decodes


class Faulty:
    """In step number `step`, everything that request `victim` computes is NaN: its K/V and its logits."""

    def __init__(self, engine: Engine, step: int, victim: str = "a") -> None:
        self.engine, self.step, self.victim = engine, step, victim
        self.num_steps = 0
        self.forward = engine.runner._forward
        engine.runner._forward = self  # type: ignore[method-assign]

    def __call__(self, batch: Batch) -> Tensor:
        logits = self.forward(batch)
        self.num_steps += 1
        return self.corrupt(batch, logits.clone()) if self.num_steps == self.step else logits

    def corrupt(self, batch: Batch, logits: Tensor) -> Tensor:
        assert batch.slot_mapping is not None
        running = [s for s in self.engine.scheduler.running if s.request_id == self.victim]
        victim_blocks = {block for sequence in running for block in sequence.block_table}
        size = self.engine.config.block_size
        hit = torch.tensor([slot // size in victim_blocks for slot in batch.slot_mapping.tolist()])
        blocks = self.engine.runner._kv.blocks
        blocks[:, batch.slot_mapping[hit] // size, ..., batch.slot_mapping[hit] % size, :] = torch.nan
        logits[hit[batch.last_token]] = torch.nan
        return logits


@pytest.mark.parametrize("step", range(1, NUM_STEPS + 3))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_failed_succeeds_when_it_is_sent_again(family: Family, step: int) -> None:
    """In any step: a piece of a prompt that gives no token must not stay in the prefix cache either."""
    answer = client(family, SMALL_STEPS)
    fault = Faulty(answer.engine, step)
    answer.engine.add(FEW_SHOT.request("a"))
    answer.run()
    assert answer.finished["a"].error == NOT_FINITE
    assert fault.num_steps == step  # at once, not when it comes to its first token
    answer.requested.clear()
    answer.engine.add(FEW_SHOT.request("b"))
    answer.run()
    assert_equals_reference(family, FEW_SHOT, answer, "b")
    assert_all_released(answer.engine)


def test_blocks_computed_before_the_fault_are_still_cached() -> None:
    answer = client("flamingo", SMALL_STEPS)
    Faulty(answer.engine, 3)
    answer.engine.add(FEW_SHOT.request("a"))
    answer.run()
    answer.engine.add(FEW_SHOT.request("b"))
    answer.run()
    assert 0 < answer.admitted["b"].cached_tokens <= 16


def test_neighbours_in_the_same_step_continue() -> None:
    answer = client("idefics", replace(CONFIG, max_tokens_per_step=40))
    Faulty(answer.engine, 3)
    neighbour = Prompt(((4, 6), (5, 3)))
    answer.engine.add(neighbour.request("neighbour"))
    answer.engine.add(FEW_SHOT.request("a"))
    answer.run()
    assert answer.finished["a"].error == NOT_FINITE
    assert_equals_reference("idefics", neighbour, answer, "neighbour")
    assert_all_released(answer.engine)


def test_several_answers_fail_together() -> None:
    answer = client("flamingo")
    Faulty(answer.engine, 6)
    answer.engine.add(FEW_SHOT.request("a", Sampling(max_tokens=9, n=3, ignore_eos=True, temperature=0.0)))
    answer.run()
    assert answer.finished["a"].error == NOT_FINITE
    answer.engine.add(FEW_SHOT.request("b"))
    answer.run()
    assert_equals_reference("flamingo", FEW_SHOT, answer, "b")
    assert_all_released(answer.engine)


@pytest.mark.parametrize("part", ["resampler", "features"])
def test_an_image_with_nonfinite_encoding_is_encoded_again(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client("openflamingo")
    model = answer.engine.runner.model
    right = getattr(model, part)
    with monkeypatch.context() as patched:
        if part == "features":
            patched.setattr(model, part, lambda pixels: right(pixels) * torch.nan)
        else:
            patched.setattr(model.resampler, "forward", lambda x: torch.full((len(x), 4, 16), torch.nan))
        answer.engine.add(FEW_SHOT.request("a"))
        answer.run()
    assert answer.finished["a"].error == NOT_FINITE
    assert not answer.engine.media.host.size
    answer.engine.add(FEW_SHOT.request("b"))
    answer.run()
    assert_equals_reference("openflamingo", FEW_SHOT, answer, "b")
    assert_all_released(answer.engine)


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("is_aborted", [False, True])
def test_an_image_with_nonfinite_encoding_fails_no_request_that_comes_later(
    is_aborted: bool, overlaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the request for which it was encoded has not read it yet, or never does."""
    answer = client("openflamingo", replace(CONFIG, overlaps=overlaps, max_frames_per_step=1, max_frames_idle=1))
    model, prompt = answer.engine.runner.model, Prompt(((-1, 3), (0, 5)))
    answer.engine.add(Prompt(((0, 5), (1, 4))).request("a"))
    with monkeypatch.context() as patched:
        right = model.features
        patched.setattr(model, "features", lambda pixels: right(pixels) * torch.nan)
        while not ("a" in answer.finished or answer.engine.media.slots.num_in_use):
            answer.step()
    if is_aborted:
        answer.engine.abort(Abort("a"))
    answer.engine.add(prompt.request("b"))
    answer.run()
    assert is_aborted or answer.finished["a"].error == NOT_FINITE
    assert_equals_reference("openflamingo", prompt, answer, "b")
    assert_all_released(answer.engine)


def test_a_corrupt_page_is_computed_again() -> None:
    """Even if it is pinned: it could never be used."""
    served = prepare_for_inference(tiny_model(CONFIGS["flamingo"]))
    answer = Client(Engine(served, prompt_tokenizer(), CONFIG), dict(IMAGES))
    prompt = Prompt(((0, 5),))
    answer.engine.add(prompt.request("before"))
    answer.run()
    key = answer.engine.media.content_keys.get(source(0))
    assert key is not None
    answer.engine.media.slots.pin(key)
    assert answer.engine.media.slots.num_pinned == 1
    answer.engine.runner._media.pages[answer.engine.media.slots.find(key)] = torch.nan
    answer.engine.blocks.clear_cache()
    answer.engine.add(prompt.request("a"))
    answer.run()
    assert answer.finished["a"].error == NOT_FINITE
    answer.engine.add(prompt.request("b"))
    answer.run()
    assert_equals_reference("flamingo", prompt, answer, "b")
    assert_all_released(answer.engine)


def test_an_answer_that_has_read_a_media_item_does_not_fail_with_its_next_decoding() -> None:
    """The page of the first image is evicted for another prompt, and its bytes cannot be decoded any more."""
    answer = client("flamingo", replace(CONFIG, num_media_slots=2, host_media_bytes=0))
    prompt = Prompt(((0, 5), (1, 5)))
    answer.engine.add(prompt.request("a", Sampling(max_tokens=20, temperature=0.0, ignore_eos=True)))
    while len(answer.ids("a")) < 3:
        answer.step()
    answer.engine.add(Prompt(((2, 5),)).request("evicts", Sampling(max_tokens=1)))
    while "evicts" not in answer.tokens:
        answer.step()
    answer.engine.add(Prompt(((3, 2), (0, 9))).request("b"))
    while answer.engine.has_work():
        for event in answer.engine.step():
            if event == MediaWanted(source(0)):
                answer.engine.fail_media(MediaFailed(digest=source(0), message="not an image"))
            else:
                answer.take(event)
    assert answer.finished["b"].error == "not an image"
    assert "a" not in answer.finished
    assert len(answer.ids("a")) == 20
    assert_all_released(answer.engine)


def test_a_request_that_waits_fails_with_its_media() -> None:
    """Also one that was computed before: its page and its prefix are gone."""
    answer = client("flamingo", replace(CONFIG, num_media_slots=2, host_media_bytes=0))
    answer.engine.add(Prompt(((0, 5),)).request("before"))
    answer.run()
    for image in (1, 2):
        answer.engine.add(Prompt(((image, 5),)).request(f"evicts {image}"))
        answer.run()
    answer.engine.blocks.clear_cache()
    for name in ("a", "b"):
        answer.engine.add(Prompt(((0, 5),)).request(name))
    assert MediaWanted(source(0)) in answer.engine.step()
    answer.engine.fail_media(MediaFailed(digest=source(0), message="not an image"))
    answer.run()
    assert [answer.finished[name].error for name in ("a", "b")] == ["not an image"] * 2
    assert_all_released(answer.engine)
