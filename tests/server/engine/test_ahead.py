"""Steps that are launched while the one before them runs: every answer is that of an engine which waits in between.

On a CPU a step is over as soon as it is launched, but its tokens reach the next one as they do on a GPU: the host has not
read them yet. `test_waits` has the same on a device whose values come late.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.engine.config import DEVICE_LIMITS, EngineConfig
from server.engine.device.graphs import Step
from server.engine.device.runner import Launched
from server.engine.engine import Engine
from server.engine.plan import Plan
from server.telemetry.measures import STEP_TOKENS
from server.wire import Abort, Embed, Grammar, Sampling, Token
from tests.engine_client import (
    CONFIG,
    FEW_SHOT,
    GREEDY,
    IMAGES,
    SERVED,
    Client,
    Prompt,
    assert_all_released,
    assert_equals_reference,
    client,
    source,
)
from tests.server.engine.test_faults import NOT_FINITE, Faulty
from tests.tiny_models import prompt_tokenizer

SERIAL = replace(CONFIG, num_blocks=256)
OVERLAPPED = replace(SERIAL, overlaps=True)
STOPS = tuple(range(0, 256, 6))  # an answer of high temperature soon ends
# the next token of these depends on nothing that the host does with the last one
BLIND = {
    "greedy": Sampling(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=0),
    "short": Sampling(max_tokens=3, temperature=0.0, ignore_eos=True),
    "ends": Sampling(max_tokens=20, temperature=3.0, seed=1, stop_token_ids=STOPS),
    "ends with log-probabilities": Sampling(max_tokens=20, temperature=3.0, seed=2, stop_token_ids=STOPS, logprobs=2),
    "truncated": Sampling(max_tokens=12, temperature=2.0, top_p=0.9, top_k=30, min_p=0.001, seed=3, ignore_eos=True),
    "biased": Sampling(max_tokens=9, temperature=0.0, ignore_eos=True, logit_bias={5: 3.0}),
    "with its prompt": Sampling(max_tokens=6, temperature=0.0, ignore_eos=True, prompt_logprobs=1),
    "several": Sampling(max_tokens=10, temperature=2.0, seed=4, n=3, stop_token_ids=STOPS),
}
SEEING = {
    "penalised": Sampling(max_tokens=9, temperature=1.0, seed=5, frequency_penalty=0.5, ignore_eos=True),
    "repetition": Sampling(max_tokens=9, temperature=0.0, repetition_penalty=1.3, ignore_eos=True),
    "not before": Sampling(max_tokens=9, temperature=3.0, seed=6, min_tokens=5, stop_token_ids=STOPS),
    "beams": Sampling(max_tokens=5, temperature=0.0, beam_width=2),
    "grammar": Sampling(max_tokens=9, temperature=2.0, seed=7, grammar=Grammar(kind="regex", text="[0-9]+,[a-c]+")),
}
ALL = BLIND | SEEING
PENALISED = {name: ALL[name] for name in ("greedy", "penalised", "repetition")}
PROMPTS = [
    FEW_SHOT,
    Prompt(((0, 6),)),
    Prompt(((-1, 9),)),
    Prompt(((1, 2), (2, 3), (0, 4))),
    Prompt(((-1, 3), (0, 5), (1, 4), (2, 3)), shots_attend="alone"),
]
OTHER = Prompt(((-1, 2), (-1, 7)))  # has no block in common with other texts


def engine(config: EngineConfig, *, is_recorded: bool = False) -> Client:
    def record(step: Step) -> Step:
        return step

    recorder = record if is_recorded else None
    return Client(Engine(SERVED["idefics"], prompt_tokenizer(), config, salt=b"test", record=recorder), dict(IMAGES))


def prompt_of(number: int, sampling: Sampling) -> Prompt:
    """Return one of the prompts; log-probabilities of a prompt whose shots attend alone have no meaning."""
    return PROMPTS[number % (len(PROMPTS) - (sampling.prompt_logprobs is not None))]


def ask(answer: Client, samplings: Mapping[str, Sampling]) -> None:
    for number, (name, sampling) in enumerate(samplings.items()):
        answer.engine.add(prompt_of(number, sampling).request(name, sampling))


def watch(answer: Client) -> list[tuple[Plan, bool]]:
    """Record the plans that are launched, and whether that is done while another one runs."""
    plans, launch = list[tuple[Plan, bool]](), answer.engine.runner.launch

    def watched(plan: Plan, before: Launched | None = None) -> Launched:
        plans.append((plan, before is not None))
        return launch(plan, before)

    answer.engine.runner.launch = watched  # type: ignore[method-assign]
    return plans


def assert_equal_answers(actual: Client, expected: Client, name: str) -> None:
    """Compare all events of a request; the batch may have been another one, so values have a tolerance."""
    assert actual.finished.get(name) == expected.finished.get(name)
    pairs = list(zip(by_answer(actual, name), by_answer(expected, name), strict=True))
    assert [plain(token) for token, _ in pairs] == [plain(other) for _, other in pairs]
    for token, other in pairs:
        assert (token.logprob is None) == (other.logprob is None)
        if token.logprob is not None and other.logprob is not None:
            assert token.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-4)
    if name in expected.scores:
        values, reference = ([s and s.logprob for s in each.scores[name].logprobs] for each in (actual, expected))
        assert values == pytest.approx(reference, abs=1e-4)


def by_answer(answer: Client, name: str) -> list[Token]:
    return sorted(answer.tokens.get(name, []), key=lambda token: token.index)


def plain(token: Token) -> Token:
    return msgspec.structs.replace(token, logprob=None)


def essence(token: Token) -> tuple[int, int, str | None]:
    return token.index, token.token_id, token.finish_reason


@pytest.mark.parametrize("is_recorded", [False, True])
@pytest.mark.parametrize("samplings", [BLIND, ALL, PENALISED], ids=["blind", "all", "penalised"])
def test_answers_equal_those_of_one_step_after_the_other(samplings: dict[str, Sampling], is_recorded: bool) -> None:
    overlapped, serial = (engine(config, is_recorded=is_recorded) for config in (OVERLAPPED, SERIAL))
    for answer in (overlapped, serial):
        # the images have pages then, so that the engines take the same steps
        answer.engine.add(Prompt(((0, 1), (1, 1), (2, 1))).request("images"))
        answer.run()
    plans = watch(overlapped)
    for answer in (overlapped, serial):
        ask(answer, samplings)
        answer.run()
        assert_all_released(answer.engine)
    for name in samplings:
        assert_equal_answers(overlapped, serial, name)
        assert overlapped.admitted[name] == serial.admitted[name]
    num_ahead = sum(is_ahead for _, is_ahead in plans)
    assert num_ahead >= (len(plans) // 2 if samplings is BLIND else 1)
    for plan, is_ahead in plans:
        # with as many tokens as it must have, an answer is like others
        names = {row.sequence.request_id for row in plan.rows if row.sequence.request_id != "not before"}
        assert not (is_ahead and names & SEEING.keys())


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_mix_of_requests_arrivals_and_aborts(data: st.DataObject) -> None:
    """Few blocks and seats force preemption; requests arrive, and end, while steps are ahead."""
    limits = replace(
        OVERLAPPED,
        num_blocks=data.draw(st.integers(34, 60)),
        max_sequences=data.draw(st.integers(1, 6)),
        max_tokens_per_step=data.draw(st.integers(8, 40)),
        num_media_slots=data.draw(st.integers(3, 6)),
        speculative_tokens=data.draw(st.sampled_from([0, 0, 2])),
    )
    names = data.draw(st.lists(st.sampled_from(sorted(ALL)), min_size=1, max_size=6))
    aborted = data.draw(st.sets(st.integers(0, len(names) - 1), max_size=1))
    overlapped, serial = engine(limits), engine(replace(limits, overlaps=False))
    for number, name in enumerate(names):
        request = prompt_of(number, ALL[name]).request(str(number), ALL[name])
        overlapped.engine.add(request)
        serial.engine.add(request)
        for _ in range(data.draw(st.integers(0, 4))):
            overlapped.step()
        if number in aborted:
            overlapped.engine.abort(Abort(str(number)))
    for answer in (overlapped, serial):
        answer.run(1000)
        assert_all_released(answer.engine)
    for number, name in enumerate(names):
        # a search of beams that is preempted may find two of the same score in another order
        if number not in aborted and name != "beams":
            tokens, expected = ([essence(t) for t in by_answer(each, str(number))] for each in (overlapped, serial))
            assert tokens == expected


def test_a_row_that_follows_the_end_of_an_answer_is_computed_in_vain() -> None:
    answer = engine(OVERLAPPED)
    plans = watch(answer)
    answer.engine.add(FEW_SHOT.request("ends", BLIND["ends"]))
    while not any(token.finish_reason for token in answer.tokens.get("ends", [])):
        answer.step()
    (row,) = plans[-1][0].rows
    assert plans[-1][1]
    assert row.sequence.is_finished
    assert answer.engine.has_work()
    assert answer.engine.blocks.num_available == OVERLAPPED.num_blocks
    num_tokens = len(answer.ids("ends"))
    assert answer.engine.step() == []
    assert len(answer.ids("ends")) == num_tokens < BLIND["ends"].max_tokens
    *_, num_computed = answer.engine.histograms()[STEP_TOKENS][""]
    assert num_computed == len(row.sequence.prompt.token_ids) + num_tokens - 1
    assert_all_released(answer.engine)


def test_no_step_follows_the_last_token_that_an_answer_may_have() -> None:
    answer = engine(OVERLAPPED)
    plans = watch(answer)
    answer.engine.add(Prompt(((-1, 5),)).request("greedy"))
    answer.engine.add(OTHER.request("short", BLIND["short"]))
    answer.run()
    counts = [len(plan.rows) for plan, is_ahead in plans if is_ahead]
    assert counts == [2] * (BLIND["short"].max_tokens - 1) + [1] * (GREEDY.max_tokens - BLIND["short"].max_tokens)


def test_a_request_that_arrives_is_in_the_next_step_that_was_not_launched_yet() -> None:
    answer = engine(OVERLAPPED)
    plans = watch(answer)
    text = Prompt(((-1, 5),))
    answer.engine.add(text.request("first", BLIND["greedy"]))
    answer.step()
    answer.engine.add(Prompt(((-1, 7),)).request("second", BLIND["greedy"]))
    answer.step()
    answer.step()
    assert [[row.sequence.request_id for row in plan.rows] for plan, _ in plans[:3]] == [
        ["first"],
        ["first"],
        ["first", "second"],
    ]
    answer.run()
    assert_equals_reference("idefics", text, answer, "first", 12)


def test_side_tasks_wait_for_the_step_that_is_ahead() -> None:
    answer = engine(OVERLAPPED)
    plans = watch(answer)
    answer.engine.add(Prompt(((-1, 5),)).request("text", BLIND["greedy"]))
    answer.step()
    assert answer.engine._ahead is not None
    answer.engine.add(Embed(request_id="image", media=[source(0)]))
    answer.run()
    assert answer.embedded["image"].shape[0] == 1
    # the features first, then the page
    pieces = [([piece.count for piece in plan.pieces], is_ahead) for plan, is_ahead in plans if plan.pieces]
    assert pieces == [([1], False), ([0], False)]
    assert_all_released(answer.engine)


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_step_that_fails_while_the_next_one_runs_fails_its_request_alone(step: int) -> None:
    answer = client("idefics", OVERLAPPED)
    fault = Faulty(answer.engine, step, "a")
    neighbour = Prompt(((-1, 6),))
    answer.engine.add(neighbour.request("neighbour"))
    answer.engine.add(OTHER.request("a"))
    answer.run()
    assert fault.num_steps > step
    assert answer.finished["a"].error == NOT_FINITE
    assert len(answer.ids("a")) == step - 1
    assert_equals_reference("idefics", neighbour, answer, "neighbour")
    answer.engine.add(OTHER.request("b"))
    answer.run()
    assert_equals_reference("idefics", OTHER, answer, "b")
    assert_all_released(answer.engine)


def test_rows_do_not_wait_for_pages_that_are_encoded_next_to_them() -> None:
    """The prompt that shows the images is computed in the next step; as many are encoded as there are frames for."""
    answer = engine(OVERLAPPED)
    plans = watch(answer)
    decoding = Prompt(((-1, 5),))
    answer.engine.add(decoding.request("text", BLIND["greedy"]))
    answer.step()
    images = Prompt(((0, 3), (1, 3), (2, 3)))
    answer.engine.add(images.request("images"))
    answer.run()
    encoded = [number for number, (plan, _) in enumerate(plans) if plan.pieces]
    assert [len(plans[number][0].pieces) for number in encoded] == [2, 1]
    for number in encoded:
        slots = {piece.encoding.key for piece in plans[number][0].pieces}
        rows = plans[number][0].rows
        assert rows
        read = {row.sequence.keys[media] for row in rows for media in row.media_index if media >= 0}
        assert slots.isdisjoint(read)
    assert_equals_reference("idefics", decoding, answer, "text", 12)
    assert_equals_reference("idefics", images, answer, "images")
    assert_all_released(answer.engine)


def test_rows_do_not_wait_for_the_page_of_features_that_were_answered() -> None:
    """It is computed next to rows, which are launched first."""
    answer = engine(OVERLAPPED)
    plans = watch(answer)
    answer.engine.add(Prompt(((-1, 5),)).request("text", BLIND["greedy"]))
    answer.step()
    answer.engine.add(Embed(request_id="image", media=[source(0)]))
    answer.run()
    (plan,) = [plan for plan, _ in plans if any(piece.is_last for piece in plan.pieces)]
    assert plan.rows
    assert not plan.reads_its_pages
    assert_all_released(answer.engine)


def test_a_prompt_that_runs_alone_reads_its_pages_at_once() -> None:
    answer = engine(replace(OVERLAPPED, max_frames_idle=8, max_tokens_per_step=40))
    plans = watch(answer)
    answer.engine.add(FEW_SHOT.request("a"))
    answer.run()
    (plan,) = [plan for plan, _ in plans if plan.pieces]
    assert len(plan.pieces) == 4
    assert sum(row.count for row in plan.rows) == len(FEW_SHOT.request("").prompt.token_ids)


def test_a_cpu_waits_for_each_step() -> None:
    assert not EngineConfig().overlaps
    assert [DEVICE_LIMITS[device].overlaps for device in ("cpu", "cuda")] == [False, True]
