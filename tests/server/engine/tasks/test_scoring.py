"""Scores against the oracle: each candidate's tokens have the reference's log-probabilities, whatever else runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.batch import Batch, MediaPages
from model.inference import prepare_for_inference
from model.reference import encode, log_probs
from server.engine.config import EngineConfig
from server.engine.device.graphs import Step
from server.engine.device.runner import Launched
from server.engine.engine import Engine
from server.engine.plan import Plan
from server.wire import Abort, Sampling, Score
from tests.engine_client import (
    CONFIG,
    FEW_SHOT,
    IMAGES,
    MODELS,
    SERVED,
    Client,
    Prompt,
    assert_all_released,
    assert_equals_reference,
    client,
)
from tests.tiny_models import CONFIGS, FAMILIES, Family, prompt_tokenizer, tiny_model

CANDIDATES = [[7, 9, 11, 3], [7], [7, 9, 11, 4], [200, 1], [5] * 9, [5] * 9]


def score(request_id: str, prompt: Prompt, candidates: Sequence[Sequence[int]], priority: int = 0) -> Score:
    request = prompt.request(request_id)
    return Score(
        request_id=request_id,
        prompt=request.prompt,
        candidates=[list(candidate) for candidate in candidates],
        priority=priority,
    )


def reference(family: Family, prompt: Prompt, candidate: Sequence[int], media: MediaPages) -> list[float]:
    request, model = prompt.request("x"), MODELS[family]
    index = request.prompt.media_index + [request.prompt.media_index[-1]] * len(candidate)
    table = log_probs(model, [*request.prompt.token_ids, *candidate], index, media)
    first = len(request.prompt.token_ids) - 1
    return [float(table[first + i, token_id]) for i, token_id in enumerate(candidate)]


def assert_scored(
    family: Family, prompt: Prompt, candidates: Sequence[Sequence[int]], scores: list[list[float]]
) -> None:
    media = encode(MODELS[family], prompt.pixels(MODELS[family]))
    assert len(scores) == len(candidates)
    for candidate, logprobs in zip(candidates, scores, strict=True):
        assert logprobs == pytest.approx(reference(family, prompt, candidate, media), abs=1e-4)


def steps(answer: Client) -> list[Plan]:
    """Record the plans that are run."""
    plans: list[Plan] = []
    launch = answer.engine.runner.launch

    def watched(plan: Plan, before: Launched | None = None) -> Launched:
        plans.append(plan)
        return launch(plan, before)

    answer.engine.runner.launch = watched  # type: ignore[method-assign]
    return plans


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_of_any_length(family: Family) -> None:
    answer = client(family)
    answer.engine.add(score("a", FEW_SHOT, CANDIDATES))
    answer.run()
    assert_scored(family, FEW_SHOT, CANDIDATES, answer.scored["a"].logprobs)
    assert_all_released(answer.engine)


def test_the_prompt_is_computed_once_and_its_blocks_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client("openflamingo", replace(CONFIG, max_tokens_per_step=64))
    plans, batches = steps(answer), list[Batch]()
    forward = answer.engine.runner._forward

    def watched(batch: Batch) -> Tensor:
        batches.append(batch)
        return forward(batch)

    monkeypatch.setattr(answer.engine.runner, "_forward", watched)
    answer.engine.add(score("a", FEW_SHOT, CANDIDATES))
    answer.run()
    length = len(FEW_SHOT.request("x").prompt.token_ids)
    assert sum(row.count for plan in plans for row in plan.rows if row.start < length) == length
    # the last token of a candidate is not computed, and those of one token not at all
    last = [plan for plan in plans if plan.rows][-1]
    assert sorted(row.count for row in last.rows) == [1, 3, 3, 8, 8]
    # all in one forward, which reads the prompt's full blocks once, and gives logits for no other rows
    table = batches[-1].block_table
    assert table is not None
    shared = table[:, : length // CONFIG.block_size]
    assert torch.equal(shared, shared[:1].expand_as(shared))
    assert len(batches[-1].last_token) == len(batches[-1].token_ids) == 1 + 3 + 3 + 8 + 8
    assert_all_released(answer.engine)


def test_candidates_of_one_token_need_no_further_step() -> None:
    answer = client("flamingo", replace(CONFIG, max_tokens_per_step=64))
    plans = steps(answer)
    candidates = [[i] for i in range(200)]
    answer.engine.add(score("a", FEW_SHOT, candidates))
    answer.run()
    assert sum(bool(plan.rows) for plan in plans) == sum(bool(plan.pieces) for plan in plans)
    assert_scored("flamingo", FEW_SHOT, candidates[:5], answer.scored["a"].logprobs[:5])
    assert len(answer.scored["a"].logprobs) == 200
    assert_all_released(answer.engine)


def test_cached_tokens_and_media_are_reported_as_for_answers() -> None:
    answer = client("idefics")
    answer.engine.add(score("cold", FEW_SHOT, CANDIDATES[:2]))
    answer.run()
    answer.requested.clear()
    answer.engine.add(score("warm", FEW_SHOT, CANDIDATES[:2]))
    answer.run()
    answer.engine.add(FEW_SHOT.request("answer"))
    answer.run()
    assert answer.requested == []
    cold, warm, admitted = answer.scored["cold"], answer.scored["warm"], answer.admitted["answer"]
    assert (cold.media_encoded, cold.media_cached, cold.cached_tokens) == (4, 0, 0)
    assert (warm.media_encoded, warm.media_cached) == (0, 4)
    assert warm.cached_tokens == admitted.cached_tokens > 0
    assert warm.logprobs[0] == pytest.approx(cold.logprobs[0], abs=1e-4)


@pytest.mark.parametrize("max_sequences", [1, 3, 8])
def test_many_candidates_run_in_waves(max_sequences: int) -> None:
    answer = client("flamingo", replace(CONFIG, max_sequences=max_sequences, max_tokens_per_step=64))
    plans = steps(answer)
    candidates = [[i, 255 - i, i % 7] for i in range(256)]
    answer.engine.add(score("a", FEW_SHOT, candidates))
    answer.engine.add(FEW_SHOT.request("neighbour"))
    answer.run(2000)
    assert max(len(plan.rows) for plan in plans) == max_sequences
    assert_scored("flamingo", FEW_SHOT, candidates, answer.scored["a"].logprobs)
    assert_equals_reference("flamingo", FEW_SHOT, answer, "neighbour")
    assert_all_released(answer.engine)


@pytest.mark.parametrize("length", [2, 5, 30, 61])
def test_only_candidates_that_fill_a_step_are_forked(length: int) -> None:
    answer = client("flamingo", replace(CONFIG, max_tokens_per_step=24, num_blocks=512))
    candidates = [[(i + j) % 256 for j in range(length)] for i in range(12)]
    answer.engine.add(score("a", FEW_SHOT, candidates))
    max_left = 0
    while answer.engine.has_work():
        answer.step()
        candidate_rows = [s for s in answer.engine.scheduler.running if not s.is_stem]
        max_left = max(max_left, sum(len(s.token_ids) - s.num_computed for s in candidate_rows))
    # the last of them may begin while one token of the step is left
    assert max_left < 24 + length
    assert_scored("flamingo", FEW_SHOT, candidates, answer.scored["a"].logprobs)
    assert_all_released(answer.engine)


def test_steps_with_more_rows_than_were_recorded_are_not_replayed() -> None:
    """Candidates of two tokens are decode steps to the graphs; beams may be more rows than sequences may run."""

    def record(step: Step) -> Step:
        return lambda: step()

    config = replace(CONFIG, max_sequences=2, num_blocks=256)
    answer = Client(Engine(SERVED["flamingo"], prompt_tokenizer(), config, record=record), dict(IMAGES))
    candidates = [[i, 9] for i in range(7)]
    answer.engine.add(score("a", FEW_SHOT, candidates))
    answer.engine.add(FEW_SHOT.request("beams", Sampling(max_tokens=5, beam_width=3)))
    answer.run()
    assert_scored("flamingo", FEW_SHOT, candidates, answer.scored["a"].logprobs)
    assert len(answer.ids("beams")) > 0
    assert_all_released(answer.engine)


def test_the_ablation_that_reads_all_previous_media() -> None:
    config = CONFIGS["flamingo"]
    config = replace(config, gated=replace(config.gated, attends="all_previous"))
    model, served = tiny_model(config), prepare_for_inference(tiny_model(config))
    answer = Client(Engine(served, prompt_tokenizer(), CONFIG), dict(IMAGES))
    request = score("a", FEW_SHOT, CANDIDATES)
    answer.engine.add(request)
    answer.run()
    media = encode(model, FEW_SHOT.pixels(model))
    for candidate, logprobs in zip(CANDIDATES, answer.scored["a"].logprobs, strict=True):
        index = request.prompt.media_index + [request.prompt.media_index[-1]] * len(candidate)
        table = log_probs(model, request.prompt.token_ids + candidate, index, media)
        first = len(request.prompt.token_ids) - 1
        assert logprobs == pytest.approx([float(table[first + i, t]) for i, t in enumerate(candidate)], abs=1e-4)
    assert_all_released(answer.engine)


prompts = st.lists(st.tuples(st.integers(-1, 5), st.integers(1, 10)), min_size=1, max_size=4).map(
    lambda shots: Prompt(tuple(shots))
)
candidate_lists = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=12), min_size=1, max_size=12)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_mix_of_scores_and_answers(family: Family, data: st.DataObject) -> None:
    """Shared media and prefixes, tiny pools that force preemption and eviction, small steps, priorities, aborts."""
    block_size = data.draw(st.sampled_from([1, 3, 4]))
    max_model_len = 80
    config = replace(
        CONFIG,
        block_size=block_size,
        max_model_len=max_model_len,
        # one more than the longest request: a candidate copies a block
        num_blocks=-(-max_model_len // block_size) + data.draw(st.integers(1, 4)),
        num_media_slots=data.draw(st.integers(1, 5)),
        max_tokens_per_step=data.draw(st.integers(8, 40)),
        max_sequences=data.draw(st.integers(1, 8)),
        host_media_bytes=data.draw(st.sampled_from([0, 600, 1 << 20])),
    )
    requests = data.draw(st.lists(st.tuples(prompts, candidate_lists, st.booleans()), min_size=1, max_size=4))
    aborted = data.draw(st.sets(st.integers(0, len(requests) - 1), max_size=2))
    answer = client(family, config)
    for i, (prompt, candidates, is_score) in enumerate(requests):
        priority = data.draw(st.integers(-1, 1))
        answer.engine.add(score(str(i), prompt, candidates, priority) if is_score else prompt.request(str(i)))
        for _ in range(data.draw(st.integers(0, 3))):
            answer.step()
        if i in aborted:
            answer.engine.abort(Abort(str(i)))
    answer.run(2000)
    for i, (prompt, candidates, is_score) in enumerate(requests):
        if i in aborted:
            continue
        if is_score:
            assert_scored(family, prompt, candidates, answer.scored[str(i)].logprobs)
        else:
            assert_equals_reference(family, prompt, answer, str(i))
    assert_all_released(answer.engine)


@pytest.mark.parametrize("family", FAMILIES)
def test_few_blocks_force_preemption(family: Family) -> None:
    config = replace(CONFIG, num_blocks=10, max_model_len=32)
    answer = client(family, config)
    few_shot = [Prompt(((image, 13),)) for image in range(3)]
    candidates = [[i, i + 1, *range(12)] for i in range(6)]
    for i, prompt in enumerate(few_shot):
        answer.engine.add(score(str(i), prompt, candidates))
    answer.run()
    assert answer.engine.residents.num_preemptions > 0
    for i, prompt in enumerate(few_shot):
        assert_scored(family, prompt, candidates, answer.scored[str(i)].logprobs)
    assert_all_released(answer.engine)


def test_an_aborted_score_releases_everything_at_any_step() -> None:
    for num_steps in count():
        answer = client("flamingo", replace(CONFIG, max_sequences=2))
        answer.engine.add(score("a", FEW_SHOT, CANDIDATES))
        for _ in range(num_steps):
            answer.step()
        if answer.scored:
            break
        answer.engine.abort(Abort("a"))
        answer.run()
        assert not answer.scored
        assert_all_released(answer.engine)
    assert num_steps > 4


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([], "candidates must not be empty"),
        ([[1], []], "at least one token"),
        ([[1], [1] * 120], "a candidate of 120 tokens exceed"),
    ],
)
def test_invalid_candidates_are_refused(candidates: list[list[int]], message: str) -> None:
    answer = client("flamingo")
    answer.engine.add(score("a", FEW_SHOT, candidates))
    answer.run()
    assert answer.finished["a"].finish_reason == "error"
    assert message in answer.finished["a"].error
    assert_all_released(answer.engine)


def test_a_candidate_that_never_fits_with_its_prompt_is_refused() -> None:
    answer = client("flamingo", replace(CONFIG, block_size=16, num_blocks=2, max_model_len=32))
    answer.engine.add(score("a", Prompt(((0, 24),)), [[1] * 7]))
    answer.run()
    assert "prompt and candidate need 3 blocks, the engine has 2" in answer.finished["a"].error


def test_a_candidate_with_nonfinite_output_fails_only_its_score(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client("flamingo")
    plans = steps(answer)
    forward = answer.engine.runner._forward

    def broken(batch: Batch) -> Tensor:
        logits = forward(batch).clone()
        for row, logit in zip(plans[-1].rows, logits, strict=False):
            if row.sequence.request_id == "a" and row.sequence.index == 3:
                logit[:] = torch.nan
        return logits

    monkeypatch.setattr(answer.engine.runner, "_forward", broken)
    answer.engine.add(score("a", FEW_SHOT, [[i, 1] for i in range(5)]))
    answer.engine.add(FEW_SHOT.request("neighbour"))
    answer.run()
    assert answer.finished["a"].error == "the model's output is not finite"
    assert_equals_reference("flamingo", FEW_SHOT, answer, "neighbour")
    assert_all_released(answer.engine)


def test_a_score_may_use_the_last_block() -> None:
    config = EngineConfig(
        block_size=4,
        num_blocks=9,
        num_media_slots=1,
        host_media_bytes=0,
        max_sequences=4,
        max_tokens_per_step=8,
        max_model_len=32,
    )
    answer = client("flamingo", config)
    prompt, candidates = Prompt(((0, 9), (1, 10))), [[i] * 11 for i in range(3)]
    answer.engine.add(score("a", prompt, candidates))
    answer.run()
    assert_scored("flamingo", prompt, candidates, answer.scored["a"].logprobs)
    assert_all_released(answer.engine)
