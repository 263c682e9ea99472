"""Proposed tokens change no answer: tokens, log-probabilities, reasons and caches are those of one token at a time.

The proposals of most tests are not those of a lookup: each is the true next token or, at random, another one.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.prompt import EncodedPrompt
from server.engine.device.graphs import Step
from server.engine.device.runner import Launched
from server.engine.engine import Engine
from server.engine.plan import Plan
from server.engine.sequence import QueueOrder, Sequence
from server.telemetry.measures import STEP_SECONDS, STEP_TOKENS
from server.wire import Abort, Grammar, Sampling
from tests.engine_client import (
    CONFIG,
    FEW_SHOT,
    IMAGES,
    SERVED,
    Client,
    Prompt,
    assert_all_released,
    assert_equals_reference,
    client,
)
from tests.tiny_models import FAMILIES, Family, prompt_tokenizer

MAX_TOKENS = 14
SAMPLING = Sampling(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True, logprobs=1)
CONFIG = replace(CONFIG, speculative_tokens=4)
PLAIN = replace(CONFIG, speculative_tokens=0)
ALONE = Prompt(((-1, 3), (0, 5), (1, 4), (2, 9), (3, 2)), shots_attend="alone", step=0)


@dataclass(frozen=True)
class Guesses:
    """Stands for a lookup: predicts a known answer from token `first` on, with a wrong token now and then."""

    answer: list[int]
    first: int
    draw: random.Random
    share_wrong: float
    hit_share: float = 1.0

    def predict(self, count: int, never: Collection[int]) -> list[int]:
        true = self.answer[self.first : self.first + count]
        return [self.draw.randrange(256) if self.draw.random() < self.share_wrong else token for token in true]


@contextmanager
def guessing(answers: Mapping[str, list[int]], seed: int = 0, share_wrong: float = 0.2) -> Iterator[None]:
    """Propose tokens of these answers, by request id; other requests have no proposals."""
    draw = random.Random(seed)

    def guesses(sequence: Sequence) -> Guesses:
        return Guesses(answers.get(sequence.request_id, []), sequence.num_output_tokens, draw, share_wrong)

    with (
        patch.object(Sequence, "updated_lookup", guesses),
        patch("server.engine.scheduler.num_worthwhile", lambda share, cost, limit: limit),
    ):
        yield


def answers_of(family: Family, prompts: Mapping[str, Prompt], sampling: Sampling = SAMPLING) -> Client:
    """Return a client without proposals that has answered these prompts, one after the other."""
    answer = client(family, replace(PLAIN, num_blocks=256, num_media_slots=16))
    for name, prompt in prompts.items():
        answer.engine.add(prompt.request(name, sampling))
        answer.run()
    return answer


def assert_same(answer: Client, expected: Client, request_id: str) -> None:
    assert answer.ids(request_id) == expected.ids(request_id)
    for token, other in zip(answer.tokens[request_id], expected.tokens[request_id], strict=True):
        assert token.finish_reason == other.finish_reason
        assert token.logprob is not None
        assert other.logprob is not None
        assert token.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-4)
        assert [i for i, _ in token.logprob.top] == [i for i, _ in other.logprob.top]


def watch(engine: Engine) -> list[Plan]:
    """Record the plans that are run."""
    plans: list[Plan] = []
    launch = engine.runner.launch

    def watched(plan: Plan, before: Launched | None = None) -> Launched:
        plans.append(plan)
        return launch(plan, before)

    engine.runner.launch = watched  # type: ignore[method-assign]
    return plans


def counts(engine: Engine) -> tuple[float, float]:
    """Return how many tokens were proposed, and how many of them accepted."""
    gauges = engine.gauges()
    return gauges["spec_decode_num_draft_tokens"], gauges["spec_decode_num_accepted_tokens"]


@pytest.mark.parametrize("prompt", [FEW_SHOT, ALONE], ids=["previous", "alone"])
@pytest.mark.parametrize("share_wrong", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_equals_the_reference(family: Family, share_wrong: float, prompt: Prompt) -> None:
    expected = answers_of(family, {"a": prompt})
    answer = client(family, CONFIG)
    plans = watch(answer.engine)
    with guessing({"a": expected.ids("a")}, share_wrong=share_wrong):
        answer.engine.add(prompt.request("a", SAMPLING))
        answer.run()
    assert_equals_reference(family, prompt, answer, "a", MAX_TOKENS)
    assert_same(answer, expected, "a")
    num_proposed, num_accepted = counts(answer.engine)
    num_decoding = sum(row.start >= row.sequence.num_prompt_tokens for plan in plans for row in plan.rows)
    assert num_proposed == sum(len(row.proposed) for plan in plans for row in plan.rows) > 0
    assert num_accepted == MAX_TOKENS - 1 - num_decoding
    assert (num_accepted == num_proposed) == (share_wrong == 0.0)
    assert_all_released(answer.engine)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_repeats_itself_takes_fewer_steps(family: Family) -> None:
    """Here the proposals are those of the lookup: a tiny model soon repeats itself."""
    sampling = msgspec.structs.replace(SAMPLING, max_tokens=40)
    expected = answers_of(family, {"a": FEW_SHOT}, sampling)
    answer = client(family, CONFIG)
    plans = watch(answer.engine)
    with patch("server.engine.scheduler.num_worthwhile", lambda share, cost, limit: limit if share else 0):
        answer.engine.add(FEW_SHOT.request("a", sampling))
        answer.run()
    assert_same(answer, expected, "a")
    num_proposed, num_accepted = counts(answer.engine)
    assert num_proposed >= num_accepted > 0
    assert len(plans) < 40


def test_the_first_token_of_an_answer_is_compared_with_the_prompt() -> None:
    prompt = EncodedPrompt(token_ids=[1, 2, 3, 4, 9, 1, 2], media_index=[-1] * 7, media=[])
    sequence = Sequence("a", prompt, SAMPLING, QueueOrder())
    sequence.append(3)
    lookup = sequence.updated_lookup()
    share = lookup.hit_share
    assert share > 0
    assert lookup.predict(3, ()) == [4, 9, 1]
    sequence.append(4)
    assert sequence.updated_lookup() is lookup
    assert lookup.hit_share > share
    assert len(lookup) == len(sequence.token_ids)


@pytest.mark.parametrize("max_tokens_per_step", [8, 24], ids=["in pieces", "at once"])
@pytest.mark.parametrize("share_wrong", [0.0, 0.4])
def test_a_sequence_that_is_preempted_after_the_step_keeps_its_tokens(
    share_wrong: float, max_tokens_per_step: int
) -> None:
    expected = answers_of("idefics", {"a": FEW_SHOT})
    answer = client("idefics", replace(CONFIG, max_tokens_per_step=max_tokens_per_step))
    answer.engine.blocks.publish = lambda block, digest: None  # type: ignore[method-assign]
    residents, commit = answer.engine.residents, answer.engine.scheduler.commit

    def commit_and_preempt(plan: Plan, failed: Collection[Sequence] = ()) -> None:
        commit(plan, failed)
        for row in plan.rows:
            if row.proposed and residents.num_preemptions < 2:
                residents.preempt(row.sequence)

    with guessing({"a": expected.ids("a")}, share_wrong=share_wrong):
        answer.engine.scheduler.commit = commit_and_preempt  # type: ignore[method-assign]
        answer.engine.add(FEW_SHOT.request("a", SAMPLING))
        answer.run()
    assert residents.num_preemptions == 2
    assert_same(answer, expected, "a")
    assert_all_released(answer.engine)


prompts = st.builds(
    Prompt,
    shots=st.lists(st.tuples(st.integers(-1, 5), st.integers(1, 12)), min_size=1, max_size=6).map(tuple),
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_mix_of_requests(family: Family, data: st.DataObject) -> None:
    """Random prompts that share media and prefixes, tiny pools that force preemption, wrong guesses, arrivals, aborts."""
    block_size = data.draw(st.sampled_from([1, 3, 4]))
    config = replace(
        CONFIG,
        block_size=block_size,
        num_blocks=-(-CONFIG.max_model_len // block_size) + data.draw(st.integers(0, 8)),
        num_media_slots=data.draw(st.integers(2, 5)),
        max_tokens_per_step=data.draw(st.integers(8, 40)),
        max_sequences=data.draw(st.integers(1, 8)),
        speculative_tokens=data.draw(st.integers(1, 6)),
    )
    requested = {str(i): prompt for i, prompt in enumerate(data.draw(st.lists(prompts, min_size=1, max_size=6)))}
    aborted = data.draw(st.sets(st.sampled_from(sorted(requested)), max_size=2))
    expected = answers_of(family, requested)
    answer = client(family, config)
    known = {name: expected.ids(name) for name in requested}
    with guessing(known, seed=data.draw(st.integers(0, 99)), share_wrong=data.draw(st.sampled_from([0.0, 0.2, 0.6]))):
        for name, prompt in requested.items():
            answer.engine.add(prompt.request(name, SAMPLING))
            for _ in range(data.draw(st.integers(0, 5))):
                answer.step()
            if name in aborted:
                answer.engine.abort(Abort(name))
        answer.run()
    for name in requested.keys() - aborted:
        assert_same(answer, expected, name)
    assert_all_released(answer.engine)


@pytest.mark.parametrize("family", FAMILIES)
def test_few_blocks_force_preemption(family: Family) -> None:
    requested = {str(image): Prompt(((image, 6),)) for image in range(4)}
    expected = answers_of(family, requested)
    answer = client(family, replace(CONFIG, num_blocks=10, max_model_len=40))
    with guessing({name: expected.ids(name) for name in requested}):
        for name, prompt in requested.items():
            answer.engine.add(prompt.request(name, SAMPLING))
        answer.run()
    assert answer.engine.residents.num_preemptions > 0
    for name in requested:
        assert_same(answer, expected, name)
    assert_all_released(answer.engine)


@pytest.mark.parametrize("block_size", [1, 3, 4])
@pytest.mark.parametrize("prompt", [FEW_SHOT, ALONE], ids=["previous", "alone"])
def test_the_prefix_cache_has_the_same_blocks(prompt: Prompt, block_size: int) -> None:
    """No block has a rejected token, and none that is complete is missing."""
    config = replace(CONFIG, block_size=block_size, num_blocks=256)
    expected, answer = client("idefics", replace(config, speculative_tokens=0)), client("idefics", config)
    expected.engine.add(prompt.request("a", SAMPLING))
    expected.run()
    with guessing({"a": expected.ids("a")}, share_wrong=0.4):
        answer.engine.add(prompt.request("a", SAMPLING))
        answer.run()
    assert_same(answer, expected, "a")
    ours, theirs = answer.engine.blocks._block_of, expected.engine.blocks._block_of
    assert ours.keys() == theirs.keys()
    for digest, block in ours.items():
        contents = answer.engine.runner._kv.blocks[:, block]
        torch.testing.assert_close(contents, expected.engine.runner._kv.blocks[:, theirs[digest]], atol=1e-4, rtol=1e-4)
    followed = replace(prompt.request("a").prompt.followed_by(expected.ids("a")))
    for client_ in (answer, expected):
        client_.engine.add(msgspec.structs.replace(prompt.request("again", SAMPLING), prompt=followed))
        client_.run()
    assert answer.admitted["again"].cached_tokens == expected.admitted["again"].cached_tokens > 0
    assert_same(answer, expected, "again")


@pytest.mark.parametrize("max_tokens", range(1, 8))
def test_an_answer_ends_at_max_tokens(max_tokens: int) -> None:
    sampling = msgspec.structs.replace(SAMPLING, max_tokens=max_tokens)
    longer, expected = answers_of("flamingo", {"a": FEW_SHOT}), answers_of("flamingo", {"a": FEW_SHOT}, sampling)
    answer = client("flamingo", CONFIG)
    plans = watch(answer.engine)
    with guessing({"a": longer.ids("a")}, share_wrong=0.0):
        answer.engine.add(FEW_SHOT.request("a", sampling))
        answer.run()
    assert_same(answer, expected, "a")
    assert answer.tokens["a"][-1].finish_reason == "length"
    end = len(FEW_SHOT.request("a").prompt.token_ids) + max_tokens
    assert max(row.end for plan in plans for row in plan.rows) == end - 1
    assert_all_released(answer.engine)


@pytest.mark.parametrize("position", range(1, 7))
def test_a_stop_token_among_accepted_tokens_ends_an_answer(position: int) -> None:
    longer = answers_of("openflamingo", {"a": FEW_SHOT})
    stop = longer.ids("a")[position]
    sampling = msgspec.structs.replace(SAMPLING, stop_token_ids=(stop,))
    expected = answers_of("openflamingo", {"a": FEW_SHOT}, sampling)
    answer = client("openflamingo", CONFIG)
    with guessing({"a": longer.ids("a")}, share_wrong=0.0):
        answer.engine.add(FEW_SHOT.request("a", sampling))
        answer.run()
    assert answer.ids("a") == longer.ids("a")[: longer.ids("a").index(stop) + 1]
    assert answer.tokens["a"][-1].finish_reason == "stop"
    assert_same(answer, expected, "a")
    assert answer.engine.blocks._block_of.keys() == expected.engine.blocks._block_of.keys()
    assert_all_released(answer.engine)


def test_each_of_several_answers_has_proposals() -> None:
    expected = answers_of("idefics", {"a": FEW_SHOT})
    answer = client("idefics", CONFIG)
    with guessing({"a": expected.ids("a")}):
        answer.engine.add(FEW_SHOT.request("a", msgspec.structs.replace(SAMPLING, n=3)))
        answer.run()
    for index in range(3):
        assert [t.token_id for t in answer.tokens["a"] if t.index == index] == expected.ids("a")
    assert counts(answer.engine)[1] > MAX_TOKENS
    assert_all_released(answer.engine)


OTHERS = {
    "random": Sampling(max_tokens=8, temperature=1.0, seed=1, ignore_eos=True),
    "biased": Sampling(max_tokens=8, temperature=0.0, logit_bias={7: 3.0}, ignore_eos=True),
    "repetition": Sampling(max_tokens=8, temperature=0.0, repetition_penalty=1.3, ignore_eos=True),
    "frequency": Sampling(max_tokens=8, temperature=0.0, frequency_penalty=0.5, ignore_eos=True),
    "min_tokens": Sampling(max_tokens=8, temperature=0.0, min_tokens=8),
    "beams": Sampling(max_tokens=8, temperature=0.0, beam_width=2, ignore_eos=True),
    "grammar": Sampling(max_tokens=8, temperature=0.0, grammar=Grammar(kind="regex", text="[a-z]{8}")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_sequences_that_are_not_greedy_have_no_proposals_next_to_one_that_has(name: str) -> None:
    expected = answers_of("flamingo", {"greedy": FEW_SHOT})
    expected.engine.add(FEW_SHOT.request(name, OTHERS[name]))
    expected.run()
    answer = client("flamingo", CONFIG)
    plans = watch(answer.engine)
    with guessing({other: expected.ids(other) for other in ("greedy", name)}):
        answer.engine.add(FEW_SHOT.request("greedy", SAMPLING))
        answer.engine.add(FEW_SHOT.request(name, OTHERS[name]))
        answer.run()
    assert answer.ids(name) == expected.ids(name)
    assert_same(answer, expected, "greedy")
    assert {row.sequence.request_id for plan in plans for row in plan.rows if row.proposed} == {"greedy"}


def test_recorded_steps_serve_proposals() -> None:
    replays: list[Step] = []

    def record(step: Step) -> Step:
        def replay() -> None:
            replays.append(step)
            step()

        return replay

    expected = answers_of("idefics", {"a": FEW_SHOT})
    config = replace(CONFIG, max_sequences=1 + CONFIG.speculative_tokens)
    answer = Client(Engine(SERVED["idefics"], prompt_tokenizer(), config, b"test", record), dict(IMAGES))
    replays.clear()
    plans = watch(answer.engine)
    with guessing({"a": expected.ids("a")}):
        answer.engine.add(FEW_SHOT.request("a", SAMPLING))
        answer.run()
    assert_same(answer, expected, "a")
    assert any(row.proposed for plan in plans for row in plan.rows)
    assert len(replays) == sum(any(row.count == 1 for row in plan.rows) for plan in plans) > 0


def test_steps_with_proposals_are_steps_that_decode() -> None:
    expected = answers_of("flamingo", {"a": FEW_SHOT})
    answer = client("flamingo", CONFIG)
    with guessing({"a": expected.ids("a")}, share_wrong=0.0):
        answer.engine.add(FEW_SHOT.request("a", SAMPLING))
        answer.run()
    histograms = answer.engine.histograms()
    steps = {kind: sum(numbers) for kind, (*numbers, _) in histograms[STEP_SECONDS].items()}
    assert (steps["decode"], steps["mixed"]) == (3, 0)  # thirteen tokens after the first, at most five in a step
    *_, num_tokens = histograms[STEP_TOKENS][""]
    assert num_tokens == len(FEW_SHOT.request("a").prompt.token_ids) + MAX_TOKENS - 1


def test_a_token_tells_whether_it_was_proposed_and_how_many_were_rejected() -> None:
    expected = answers_of("flamingo", {"a": FEW_SHOT})
    answer = client("flamingo", CONFIG)
    with guessing({"a": expected.ids("a")}, share_wrong=0.4):
        answer.engine.add(FEW_SHOT.request("a", SAMPLING))
        answer.run()
    num_accepted = sum(token.is_proposed for token in answer.tokens["a"])
    num_rejected = sum(token.num_rejected for token in answer.tokens["a"])
    assert (num_accepted + num_rejected, num_accepted) == counts(answer.engine)
    assert num_accepted
    assert num_rejected
