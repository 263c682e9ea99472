"""The host waits for the device once per step, on a device that counts; the answers are those of a CPU.

The device also checks that no stream reads what another one may still write, and that no value is read before it is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, cast

import msgspec
import pytest
import torch
from torch import Tensor, nn

from model.batch import Batch, KVCache, MediaPages
from model.inference import prepare_for_inference
from model.prompt import ShotsAttend
from server.engine.build import warm_up
from server.engine.caches.media import Piece
from server.engine.config import EngineConfig
from server.engine.device.graphs import Recorder, Step
from server.engine.device.runner import Launched, Runner
from server.engine.device.sampler import Result
from server.engine.device.transfers import Downloads
from server.engine.engine import Engine
from server.engine.plan import Plan
from server.wire import Sampling
from tests.device_order import Order
from tests.engine_client import CONFIG, IMAGE_TOKEN, IMAGES, SERVED, Client, Prompt, assert_equals_reference
from tests.stand_in_device import DeviceTensor, Waits, on_host, stand_in_device
from tests.tiny_models import CONFIGS, prompt_tokenizer, tiny_model

NUM_ROWS = 64
LIMITS = replace(CONFIG, num_blocks=1024, num_media_slots=64, max_sequences=NUM_ROWS, max_tokens_per_step=NUM_ROWS)


def forward(order: Order, runner: Runner, batch: Batch) -> Tensor:
    """Compute the logits as kernels on the device would, for which the host does not wait."""
    model = SERVED["idefics"].flamingo
    plain = replace(batch, **{field.name: on_host(getattr(batch, field.name)) for field in fields(batch)})
    pages, blocks = on_host(runner._media.pages), on_host(runner._kv.blocks)
    logits = model(plain, KVCache(blocks), MediaPages(pages, model.config.gated_layers))
    read = [] if plain.media_slot is None else [pages[slot] for slot in plain.media_slot.unique().tolist() if slot >= 0]
    order.launch([*plain.tensors, *read, blocks], writes=[blocks], results=[logits])
    return DeviceTensor(logits)


def engine_on_device(waits: Waits, record: Recorder | None = None, limits: EngineConfig = LIMITS) -> Engine:
    """Return an engine whose model says that it is on the device."""
    model = prepare_for_inference(tiny_model(CONFIGS["idefics"]))
    flamingo = model.flamingo
    embed = flamingo.language_model.embed
    embed.weight = nn.Parameter(DeviceTensor(embed.weight.detach()), requires_grad=False)
    flamingo.vision.forward = waits.computed_on_host(flamingo.vision.forward)  # type: ignore[method-assign]
    flamingo.resampler.forward = waits.computed_on_host(flamingo.resampler.forward)
    projection: Any = waits.computed_on_host(model.project_media)
    model = replace(model, project_media=projection)
    engine = Engine(model, prompt_tokenizer(), limits, salt=b"test", record=record)
    waits.order.by_row(on_host(engine.runner._media.pages))
    return engine


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    with stand_in_device() as waits:
        monkeypatch.setattr(Runner, "_forward", lambda runner, batch: forward(waits.order, runner, batch))
        yield waits


CASES = {
    "greedy": Sampling(max_tokens=8, temperature=0.0, ignore_eos=True),
    "temperature 1": Sampling(max_tokens=8, seed=1, ignore_eos=True),
    "log-probabilities": Sampling(max_tokens=8, seed=1, ignore_eos=True, logprobs=5),
    "log-probabilities of prompts": Sampling(max_tokens=24, seed=1, ignore_eos=True, logprobs=0, prompt_logprobs=2),
    "all parameters": Sampling(
        max_tokens=8,
        min_tokens=8,
        stop_token_ids=(7,),
        seed=1,
        logprobs=5,
        top_p=0.9,
        top_k=50,
        min_p=0.01,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        repetition_penalty=1.1,
        logit_bias={5: 1.0, 6: -2.0},
    ),
    "beams": Sampling(max_tokens=4, temperature=0.0, beam_width=3, logprobs=1),
}


def answers(engine: Engine, sampling: Sampling, num_rows: int = NUM_ROWS) -> Client:
    """Return the answers to as many prompts as fill a step; each second one has shots that attend alone."""
    answer = Client(engine, dict(IMAGES))
    for number in range(num_rows // max(sampling.beam_width, 1)):
        shots = ((-1, 2), (number % 3, 2), (4, 3), (3, 1 + number % 2))
        attend: ShotsAttend = "alone" if number % 2 and sampling.prompt_logprobs is None else "previous"
        answer.engine.add(Prompt(shots, shots_attend=attend).request(str(number), sampling))
    answer.run()
    return answer


def numbers(answers: Mapping[str, object]) -> list[Any]:
    """Return the ids, log-probabilities and reasons of answers in one list.

    Which rows share a step depends on the clock: their last digits depend on the step, and the order of answers, too.
    """
    return list(_leaves(msgspec.to_builtins(answers)))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple):
        for item in map(value.__getitem__, sorted(value)) if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


def watch(engine: Engine, waits: Waits, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Plan, list[str]]]:
    """Warm an engine up, and record the plans that it runs from then on, each with its waits."""
    warm_up(engine, IMAGE_TOKEN, image_size=8)
    wait_for, steps = engine._wait_for, list[tuple[Plan, list[str]]]()
    num_before = len(waits)

    def watched(launched: Launched) -> list[Result]:
        nonlocal num_before
        results = wait_for(launched)
        steps.append((launched.plan, waits[num_before:]))
        num_before = len(waits)
        return results

    monkeypatch.setattr(engine, "_wait_for", watched)
    return steps


@pytest.mark.parametrize("sampling", CASES.values(), ids=CASES)
def test_the_host_waits_once_per_step_and_once_for_media(
    sampling: Sampling, waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_on_device(waits)
    steps = watch(engine, waits, monkeypatch)
    answer = answers(engine, sampling)
    assert max(len(plan.rows) for plan, _ in steps) > NUM_ROWS * 3 // 4
    for plan, waited in steps:
        assert waited == ["copy to the host"] * (bool(plan.rows) + any(piece.count for piece in plan.pieces))
    on_cpu = answers(Engine(SERVED["idefics"], prompt_tokenizer(), LIMITS, salt=b"test"), sampling)
    # within the tolerance that all tests of answers have: the steps have other rows, and so other last digits
    assert numbers(answer.tokens) == pytest.approx(numbers(on_cpu.tokens), abs=1e-5)
    assert numbers(answer.scores) == pytest.approx(numbers(on_cpu.scores), abs=1e-5)


@pytest.mark.parametrize("logprobs", [None, 1])
def test_proposed_tokens_are_verified_in_the_same_wait(
    logprobs: int | None, waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    propose = "server.engine.scheduler.num_worthwhile"
    monkeypatch.setattr(propose, lambda hit_share, cost, limit: limit if hit_share else 0)
    sampling = Sampling(max_tokens=16, temperature=0.0, ignore_eos=True, logprobs=logprobs)
    engine = engine_on_device(waits, limits=replace(LIMITS, speculative_tokens=3, max_tokens_per_step=4 * NUM_ROWS))
    steps = watch(engine, waits, monkeypatch)
    answer = answers(engine, sampling)
    proposed = [waited for plan, waited in steps if not plan.pieces and any(row.proposed for row in plan.rows)]
    assert proposed
    assert all(waited == ["copy to the host"] for waited in proposed)
    assert engine.gauges()["spec_decode_num_accepted_tokens"] > 0
    on_cpu = answers(Engine(SERVED["idefics"], prompt_tokenizer(), LIMITS, salt=b"test"), sampling)
    assert {name: answer.ids(name) for name in answer.tokens} == {name: on_cpu.ids(name) for name in on_cpu.tokens}


@pytest.mark.parametrize("name", ["greedy", "temperature 1", "log-probabilities"])
def test_a_recorded_step_is_one_copy_to_the_device_and_one_back(
    name: str, waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    replays: list[Step] = []

    def record(step: Step) -> Step:
        def replay() -> None:
            replays.append(step)
            step()

        return replay

    engine, copies = engine_on_device(waits, record), list[tuple[int, list[str]]]()
    warm_up(engine, IMAGE_TOKEN, image_size=8)
    launch = engine.runner.launch

    def watched(plan: Plan) -> Launched:
        num_waits, num_uploads, num_replays = len(waits), waits.num_uploads, len(replays)
        launched = launch(plan)
        launched.results()
        if len(replays) > num_replays and not plan.pieces and not plan.copies:
            copies.append((waits.num_uploads - num_uploads, waits[num_waits:]))
        return launched

    monkeypatch.setattr(engine.runner, "launch", watched)
    answer = answers(engine, CASES[name])
    assert copies
    num_uploads = 1 if name == "greedy" else 2  # of the batch, and of the parameters
    assert all(copied == (num_uploads, ["copy to the host"]) for copied in copies)
    on_cpu = answers(Engine(SERVED["idefics"], prompt_tokenizer(), LIMITS, salt=b"test"), CASES[name])
    assert numbers(answer.tokens) == pytest.approx(numbers(on_cpu.tokens))


@pytest.mark.parametrize("is_recorded", [False, True])
@pytest.mark.parametrize("name", ["greedy", "temperature 1", "log-probabilities"])
def test_steps_that_overlap_give_the_same_answers_with_a_wait_each(
    name: str, is_recorded: bool, waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some answers end early, so that rows of the next step have no rows after them."""
    sampling = msgspec.structs.replace(CASES[name], stop_token_ids=tuple(range(0, 256, 7)))
    engine = engine_on_device(waits, (lambda step: step) if is_recorded else None, replace(LIMITS, overlaps=True))
    steps = watch(engine, waits, monkeypatch)
    launch, num_ahead = engine.runner.launch, 0

    def watched(plan: Plan, before: Launched | None = None) -> Launched:
        nonlocal num_ahead
        num_ahead += before is not None
        return launch(plan, before)

    monkeypatch.setattr(engine.runner, "launch", watched)
    answer = answers(engine, sampling, num_rows=8)
    assert num_ahead > 3
    for plan, waited in steps:
        assert waited == ["copy to the host"] * (bool(plan.rows) + any(piece.count for piece in plan.pieces))
    on_cpu = answers(Engine(SERVED["idefics"], prompt_tokenizer(), LIMITS, salt=b"test"), sampling, num_rows=8)
    assert {name: answer.ids(name) for name in answer.tokens} == {name: on_cpu.ids(name) for name in on_cpu.tokens}


def test_media_are_encoded_at_the_same_time_as_rows_that_do_not_read_them(
    waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_on_device(waits, limits=replace(LIMITS, overlaps=True))
    encoder, encode, are_at_once = engine.runner.encoder, engine.runner.encoder.encode, list[bool]()
    main, side = waits.order.current, cast(Any, encoder.stream._stream)

    def watched(pieces: Sequence[Piece], after: torch.cuda.Event | None = None) -> Downloads:
        downloads = encode(pieces, after)
        if pieces:
            are_at_once.append(not side.comes_after(main, main.count))
        return downloads

    monkeypatch.setattr(encoder, "encode", watched)
    answer = Client(engine, dict(IMAGES))
    prompts = {"text": Prompt(((-1, 5),)), "images": Prompt(((0, 3), (1, 3), (2, 3))), "alone": Prompt(((3, 4),))}
    for name in ("text", "images"):
        answer.engine.add(prompts[name].request(name))
        answer.step()
    answer.run()
    assert are_at_once == [True, True]  # steps of two frames
    answer.engine.add(prompts["alone"].request("alone"))
    answer.run()
    assert are_at_once == [True, True, False]
    for name, prompt in prompts.items():
        assert_equals_reference("idefics", prompt, answer, name)
