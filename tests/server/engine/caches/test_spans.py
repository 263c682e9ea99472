"""Prompts whose shots attend alone: the reference's log-probabilities, and spans that are computed once, in any order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import paged_attention_cpu
from model.config import AlonePositions, LanguageModelConfig
from model.flamingo import Flamingo
from model.inference import prepare_for_inference
from model.reference import encode, generate, log_probs
from server.engine.device.runner import Launched
from server.engine.engine import Engine
from server.engine.plan import Plan
from server.wire import Abort, Sampling, Score
from tests.engine_client import (
    CONFIG,
    GREEDY,
    IMAGE_TOKEN,
    IMAGES,
    Client,
    Prompt,
    assert_all_released,
    assert_equals_reference,
    client,
    reference_model,
)
from tests.tiny_models import CONFIGS, FAMILIES, LANGUAGE_MODEL, Family, prompt_tokenizer, tiny_model

POSITIONS: tuple[AlonePositions, ...] = get_args(AlonePositions)
TOLERANCE = 1e-5
# in float64, what is left is the rounding of softmax and log-probabilities to float32; in float32, those of drawn prompts
# were up to 2.2e-5 from those in float64, and the plain model's own up to 1.2e-5
DRAWN_TOLERANCES = {torch.float64: 3e-6, torch.float32: 1e-4}
PREFIX = (-1, 3)
SHOTS = ((0, 5), (1, 4), (2, 9))
QUERY = (3, 2)


def alone(*parts: tuple[int, int]) -> Prompt:
    return Prompt(parts, shots_attend="alone", step=0)


ALONE = alone(PREFIX, *SHOTS, QUERY)


def watch(answer: Client) -> list[Plan]:
    """Record the plans that are run."""
    plans, launch = list[Plan](), answer.engine.runner.launch

    def watched(plan: Plan, before: Launched | None = None) -> Launched:
        plans.append(plan)
        return launch(plan, before)

    answer.engine.runner.launch = watched  # type: ignore[method-assign]
    return plans


def ask(answer: Client, name: str, prompt: Prompt, sampling: Sampling = GREEDY) -> None:
    answer.engine.add(prompt.request(name, sampling))
    answer.run()


def logprobs(answer: Client, name: str) -> list[float]:
    return [token.logprob.logprob for token in answer.tokens[name] if token.logprob is not None]


def num_tokens(*parts: tuple[int, int]) -> int:
    return len(Prompt(parts).request("x").prompt.token_ids)


@pytest.mark.parametrize("alone_positions", POSITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_prompt(family: Family, alone_positions: AlonePositions) -> None:
    answer = client(family, alone_positions=alone_positions)
    ask(answer, "a", ALONE)
    ask(answer, "cached", ALONE)
    for name in ("a", "cached"):
        assert_equals_reference(family, ALONE, answer, name, tolerance=TOLERANCE)
    assert_all_released(answer.engine)
    plain = replace(ALONE, shots_attend="previous")
    ask(answer, "plain", plain)
    assert_equals_reference(family, plain, answer, "plain", tolerance=TOLERANCE)
    assert logprobs(answer, "plain") != pytest.approx(logprobs(answer, "a"), abs=1e-3)


GPT_NEOX = replace(LANGUAGE_MODEL, family="gpt_neox", num_kv_heads=4, rotary_dim=4, parallel_residual=True)
LANGUAGE_MODELS = {
    "opt": replace(
        LANGUAGE_MODEL,
        family="opt",
        num_kv_heads=4,
        position="learned",
        position_offset=2,
        rotary_dim=0,
        tied_head=True,
    ),
    "gpt_neox": GPT_NEOX,
    "gpt_neox in a row": replace(GPT_NEOX, alone_positions="in_a_row"),
}


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS)
def test_other_language_models(language_model: LanguageModelConfig) -> None:
    config = replace(CONFIGS["openflamingo"], language_model=language_model)
    model = tiny_model(config)
    answer = Client(Engine(prepare_for_inference(tiny_model(config)), prompt_tokenizer(), CONFIG), dict(IMAGES))
    ask(answer, "a", ALONE)
    prompt = ALONE.request("a").prompt
    expected = generate(
        model,
        prompt.token_ids,
        prompt.media_index,
        ALONE.pixels(model),
        max_tokens=6,
        suppressed_ids=[IMAGE_TOKEN],
        span_starts=prompt.span_starts,
    )
    assert answer.ids("a") == expected.token_ids
    assert logprobs(answer, "a") == pytest.approx(expected.logprobs, abs=TOLERANCE)


shots = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 12)), min_size=1, max_size=6)
beginnings = st.lists(st.tuples(st.just(-1), st.integers(1, 9)), max_size=1)
prompts = st.builds(
    lambda beginning, shots, form: Prompt((*beginning, *shots), shots_attend=form, step=0),
    beginnings,
    shots,
    st.sampled_from(["alone", "alone", "previous"]),
)
CANDIDATES = [[7, 9, 11], [7], [200, 1, 5, 5, 5]]


@pytest.mark.parametrize("alone_positions", POSITIONS)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_mix_of_forms(family: Family, alone_positions: AlonePositions, data: st.DataObject) -> None:
    """Answers and scores of both forms with shots from a small pool, tiny caches, small steps, any arrival, aborts."""
    block_size = data.draw(st.sampled_from([1, 3, 4]))
    config = replace(
        CONFIG,
        block_size=block_size,
        num_blocks=-(-CONFIG.max_model_len // block_size) + data.draw(st.integers(0, 12)),
        num_media_slots=data.draw(st.integers(2, 5)),
        max_tokens_per_step=data.draw(st.integers(8, 40)),
        max_sequences=data.draw(st.integers(1, 8)),
        host_media_bytes=data.draw(st.sampled_from([0, 600, 1 << 20])),
    )
    requested = data.draw(st.lists(st.tuples(prompts, st.booleans()), min_size=1, max_size=6))
    aborted = data.draw(st.sets(st.integers(0, len(requested) - 1), max_size=2))
    dtype = data.draw(st.sampled_from(list(DRAWN_TOLERANCES)))
    answer = client(family, config, alone_positions, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_attention_cpu, "MAX_LOOP_PRODUCTS", data.draw(st.sampled_from([0, 2400, 1 << 23])))
        patch.setattr(paged_attention_cpu, "MAX_REPEATED_PRODUCTS", data.draw(st.sampled_from([0, 1 << 26])))
        if data.draw(st.booleans()):  # decoding rows are gathered, as without Numba
            patch.setattr(paged_attention_cpu, "use_compiled", lambda *_: False)
        for i, (prompt, is_scored) in enumerate(requested):
            request = prompt.request(str(i))
            score = Score(request_id=str(i), prompt=request.prompt, candidates=CANDIDATES)
            answer.engine.add(score if is_scored else request)
            for _ in range(data.draw(st.integers(0, 3))):
                answer.step()
            if i in aborted:
                answer.engine.abort(Abort(str(i)))
        answer.run()
    for i, (prompt, is_scored) in enumerate(requested):
        if is_scored and i not in aborted:
            reference = reference_model(family, alone_positions)
            assert_scored(reference, prompt, answer.scored[str(i)].logprobs, DRAWN_TOLERANCES[dtype])
        elif i not in aborted:
            assert_equals_reference(family, prompt, answer, str(i), tolerance=DRAWN_TOLERANCES[dtype])
    assert_all_released(answer.engine)


def assert_scored(model: Flamingo, prompt: Prompt, scores: list[list[float]], tolerance: float) -> None:
    encoded = prompt.request("x").prompt
    media = encode(model, prompt.pixels(model))
    for candidate, logprobs in zip(CANDIDATES, scores, strict=True):
        whole = encoded.followed_by(candidate)
        starts = encoded.span_starts if encoded.has_spans else ()
        table = log_probs(model, whole.token_ids, whole.media_index, media, starts)
        first = len(encoded.token_ids) - 1
        expected = [float(table[first + i, token_id]) for i, token_id in enumerate(candidate)]
        assert logprobs == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("alone_positions", POSITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_few_blocks_force_preemption(family: Family, alone_positions: AlonePositions) -> None:
    answer = client(family, replace(CONFIG, num_blocks=16, max_model_len=64), alone_positions)
    sampling = msgspec.structs.replace(GREEDY, max_tokens=16)
    requested = [alone((-1, 2), (image, 6), ((image + 1) % 4, 5), (image, 3)) for image in range(4)]
    for i, prompt in enumerate(requested):
        answer.engine.add(prompt.request(str(i), sampling))
    answer.run()
    assert answer.engine.residents.num_preemptions > 0
    for i, prompt in enumerate(requested):
        assert_equals_reference(family, prompt, answer, str(i), sampling.max_tokens, TOLERANCE)
    assert_all_released(answer.engine)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_the_shots_changes_nothing(family: Family) -> None:
    """The shots lie in the block table as sorted by their hashes; what is left is rounding, which differs between runs."""
    hashes, ids, scores = [], [], []
    for order in (SHOTS, SHOTS[::-1], (SHOTS[1], SHOTS[0], SHOTS[2])):
        answer = client(family)
        plans = watch(answer)
        ask(answer, "a", alone(PREFIX, *order, QUERY))
        spans = [row.sequence.spans for plan in plans for row in plan.rows][-1]
        assert spans is not None
        hashes.append(list(spans.hashes))
        ids.append(answer.ids("a"))
        scores.append(logprobs(answer, "a"))
    assert hashes[1:] == hashes[:1] * 2
    assert ids[1:] == ids[:1] * 2
    assert scores[1:] == [pytest.approx(scores[0], abs=TOLERANCE)] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_shots_in_a_row_have_an_order(family: Family) -> None:
    results = []
    for order in (SHOTS, SHOTS[::-1]):
        answer = client(family, alone_positions="in_a_row")
        ask(answer, "a", alone(PREFIX, *order, QUERY))
        results.append(logprobs(answer, "a"))
    assert results[0] != pytest.approx(results[1], abs=1e-3)


@pytest.mark.parametrize("alone_positions", POSITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_shots_are_reused_in_any_order_and_before_any_query(family: Family, alone_positions: AlonePositions) -> None:
    answer = client(family, alone_positions=alone_positions)
    ask(answer, "first", ALONE)
    answer.requested.clear()
    plans = watch(answer)
    other = alone(PREFIX, SHOTS[2], SHOTS[0], (4, 7))
    ask(answer, "other", other)
    assert answer.admitted["other"].cached_tokens == num_tokens(PREFIX, SHOTS[2], SHOTS[0])
    assert sum(row.count for plan in plans for row in plan.rows) == 8 + GREEDY.max_tokens - 1
    assert len(answer.requested) == 1
    assert_equals_reference(family, other, answer, "other", tolerance=TOLERANCE)


@pytest.mark.parametrize("new", SHOTS)
def test_a_new_shot_is_computed_with_the_query_in_one_step(new: tuple[int, int]) -> None:
    """Wherever its hash puts it among the others."""
    answer = client("idefics")
    ask(answer, "first", alone(PREFIX, *(shot for shot in SHOTS if shot != new), QUERY))
    ask(answer, "media", Prompt((new,)))
    plans = watch(answer)
    ask(answer, "all", ALONE)
    assert next(row.count for plan in plans for row in plan.rows) == num_tokens(new, QUERY)


def test_shots_after_one_prefix_are_not_found_after_another() -> None:
    answer, prefix = client("openflamingo"), (-1, 4)
    ask(answer, "first", ALONE)
    ask(answer, "prefix", alone(prefix, (4, 6), QUERY))
    ask(answer, "second", alone(prefix, *SHOTS, QUERY))
    assert answer.admitted["second"].cached_tokens == num_tokens(prefix)
    assert_equals_reference("openflamingo", alone(prefix, *SHOTS, QUERY), answer, "second")


def test_the_same_query_after_other_shots_is_computed_again() -> None:
    answer = client("openflamingo")
    ask(answer, "first", alone(PREFIX, *SHOTS, (3, 9)))
    fewer = alone(PREFIX, *SHOTS[:2], (3, 9))
    ask(answer, "fewer", fewer)
    assert answer.admitted["fewer"].cached_tokens == num_tokens(PREFIX, *SHOTS[:2])
    assert_equals_reference("openflamingo", fewer, answer, "fewer", tolerance=TOLERANCE)


def test_the_same_prompt_finds_the_blocks_of_its_query_in_any_order() -> None:
    answer = client("flamingo")
    ask(answer, "first", alone(PREFIX, *SHOTS, (3, 9)))
    ask(answer, "again", alone(PREFIX, *SHOTS[::-1], (3, 9)))
    assert answer.admitted["again"].cached_tokens == num_tokens(PREFIX, *SHOTS) + 8
    assert logprobs(answer, "again") == pytest.approx(logprobs(answer, "first"), abs=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_query_after_shots_in_another_row_is_computed_again(family: Family) -> None:
    answer = client(family, alone_positions="in_a_row")
    for name, order in (("first", SHOTS), ("again", SHOTS), ("other", SHOTS[::-1])):
        prompt = alone(PREFIX, *order, (3, 9))
        ask(answer, name, prompt)
        assert_equals_reference(family, prompt, answer, name, tolerance=TOLERANCE)
    assert answer.admitted["again"].cached_tokens == num_tokens(PREFIX, *SHOTS) + 8
    assert answer.admitted["other"].cached_tokens == num_tokens(PREFIX, *SHOTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_positions_are_the_same_for_one_shot(family: Family) -> None:
    results = []
    for alone_positions in POSITIONS:
        answer = client(family, alone_positions=alone_positions)
        ask(answer, "a", alone(PREFIX, SHOTS[0], QUERY))
        results.append((answer.ids("a"), logprobs(answer, "a")))
    assert results[0][0] == results[1][0]
    assert results[0][1] == pytest.approx(results[1][1], abs=TOLERANCE)


@pytest.mark.parametrize(
    "change",
    [
        lambda prompt: replace(prompt, token_ids=[5, *prompt.token_ids[1:]]),
        lambda prompt: replace(prompt, media=[prompt.media[3], *prompt.media[1:]]),
    ],
    ids=["another prefix", "another image"],
)
def test_a_span_depends_on_the_prefix_and_on_its_image(change: Callable[[object], object]) -> None:
    answer = client("openflamingo")
    ask(answer, "first", ALONE)
    request = ALONE.request("changed")
    answer.engine.add(msgspec.structs.replace(request, prompt=change(request.prompt)))
    answer.run()
    assert answer.admitted["changed"].cached_tokens in (0, num_tokens(PREFIX, *SHOTS[1:]))
    assert logprobs(answer, "changed") != pytest.approx(logprobs(answer, "first"), abs=1e-3)


@pytest.mark.parametrize("max_tokens_per_step", [9, 40])
def test_a_span_that_another_request_computes_is_not_computed_again(max_tokens_per_step: int) -> None:
    answer = client("openflamingo", replace(CONFIG, max_tokens_per_step=max_tokens_per_step))
    plans = watch(answer)
    requested = [ALONE, alone(PREFIX, SHOTS[2], SHOTS[0], (4, 2)), alone(PREFIX, SHOTS[1], (0, 2)), ALONE]
    for i, prompt in enumerate(requested):
        answer.engine.add(prompt.request(str(i)))
    answer.run()
    num_computed = sum(
        1
        for plan in plans
        for row in plan.rows
        for position in range(row.start, row.start + row.count)
        if position < row.sequence.prompt.span_starts[-1]
    )
    assert num_computed == num_tokens(PREFIX, *SHOTS)
    for i, prompt in enumerate(requested):
        assert_equals_reference("openflamingo", prompt, answer, str(i), tolerance=TOLERANCE)


@pytest.mark.parametrize("alone_positions", POSITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shot_longer_than_a_step_is_computed_in_pieces(family: Family, alone_positions: AlonePositions) -> None:
    answer = client(family, replace(CONFIG, max_tokens_per_step=5), alone_positions)
    prompt = alone((-1, 12), (0, 14), (1, 1), (2, 11), (3, 13))
    ask(answer, "a", prompt)
    assert_equals_reference(family, prompt, answer, "a", tolerance=TOLERANCE)


@pytest.mark.parametrize("alone_positions", POSITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_that_was_never_written_is_not_read(family: Family, alone_positions: AlonePositions) -> None:
    answer = client(family, alone_positions=alone_positions)
    answer.engine.runner._kv.blocks[:] = torch.nan
    ask(answer, "a", ALONE)
    assert_equals_reference(family, ALONE, answer, "a", tolerance=TOLERANCE)


@pytest.mark.parametrize("alone_positions", POSITIONS)
def test_several_answers_and_beams(alone_positions: AlonePositions) -> None:
    answer = client("idefics", alone_positions=alone_positions)
    ask(answer, "greedy", ALONE)
    ask(answer, "three", ALONE, msgspec.structs.replace(GREEDY, n=3))
    for index in range(3):
        ids = [token.token_id for token in answer.tokens["three"] if token.index == index]
        assert ids == answer.ids("greedy")
    beams = Sampling(max_tokens=5, temperature=0.0, beam_width=3, ignore_eos=True)
    ask(answer, "beams", ALONE, beams)
    prompt, model = ALONE.request("x").prompt, reference_model("idefics", alone_positions)
    media = encode(model, ALONE.pixels(model))
    whole = prompt.followed_by(answer.ids("beams"))
    table = log_probs(model, whole.token_ids, whole.media_index, media, prompt.span_starts)
    first = len(prompt.token_ids) - 1
    expected = [float(table[first + i, token_id]) for i, token_id in enumerate(answer.ids("beams"))]
    assert logprobs(answer, "beams") == pytest.approx(expected, abs=TOLERANCE)
    assert_all_released(answer.engine)


def test_log_probabilities_of_the_prompt_are_refused() -> None:
    answer = client("flamingo")
    ask(answer, "a", ALONE, Sampling(max_tokens=0, prompt_logprobs=0))
    assert answer.finished["a"].error == "prompt_logprobs cannot be combined with shots that attend alone"
