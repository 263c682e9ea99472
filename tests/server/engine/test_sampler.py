"""Sampling: truncation keeps the right tokens, draws follow the distribution, and each parameter has its defined effect."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.prompt import EncodedPrompt
from server.engine.sampler import Sampler, draw, is_greedy
from server.engine.sequence import Order, Sequence
from server.wire import Sampling

PROBS = torch.tensor([0.4, 0.3, 0.2, 0.1])
LOGITS = PROBS.log()[None]


def make_sequence(sampling: Sampling, prompt: tuple[int, ...] = (0,), output: tuple[int, ...] = ()) -> Sequence:
    encoded = EncodedPrompt(token_ids=list(prompt), media_index=[-1] * len(prompt), media=[])
    sequence = Sequence("r", encoded, sampling, Order())
    for token_id in output:
        sequence.append(token_id)
    return sequence


def drawn(sampling: Sampling, uniform: float) -> int:
    cut = bool(sampling.top_k or sampling.top_p < 1 or sampling.min_p)
    return int(draw(LOGITS, [sampling], [uniform], truncate=cut)[0])


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(max_tokens=1), [0, 1, 2, 3]),
        (Sampling(max_tokens=1, top_k=2), [0, 1]),
        (Sampling(max_tokens=1, top_p=0.4), [0]),
        (Sampling(max_tokens=1, top_p=0.41), [0, 1]),
        (Sampling(max_tokens=1, top_p=1e-9), [0]),
        (Sampling(max_tokens=1, min_p=0.49), [0, 1, 2]),
        (Sampling(max_tokens=1, min_p=0.6), [0, 1]),
        (Sampling(max_tokens=1, top_k=3, top_p=0.65, min_p=0.1), [0, 1]),
    ],
)
def test_truncation_keeps_exactly_these_tokens(sampling: Sampling, kept: list[int]) -> None:
    grid = [i / 1000 for i in range(1000)] + [1 - 2**-53]
    counts = [sum(drawn(sampling, u) == token for u in grid) / len(grid) for token in range(4)]
    expected = [float(PROBS[i] / PROBS[kept].sum()) if i in kept else 0.0 for i in range(4)]
    assert counts == pytest.approx(expected, abs=0.003)


def test_temperature_sharpens() -> None:
    grid = [i / 1000 for i in range(1000)]
    share = sum(drawn(Sampling(max_tokens=1, temperature=0.5), u) == 0 for u in grid) / 1000
    assert share == pytest.approx(float(PROBS[0] ** 2 / (PROBS**2).sum()), abs=0.003)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=6),
    st.sampled_from([0, 2]),
    st.sampled_from([1.0, 0.6]),
)
def test_a_row_draws_the_same_alone_and_among_others(uniform: list[float], top_k: int, top_p: float) -> None:
    rows = torch.randn(len(uniform), 11, generator=torch.Generator().manual_seed(1))
    samplings = [Sampling(max_tokens=1, top_k=top_k, top_p=top_p, temperature=0.5 + i) for i in range(len(uniform))]
    cut = bool(top_k or top_p < 1)
    together = draw(rows, samplings, uniform, truncate=cut).tolist()
    alone = [int(draw(rows[i : i + 1], [samplings[i]], [uniform[i]], truncate=cut)[0]) for i in range(len(uniform))]
    assert together == alone


@pytest.mark.parametrize(
    ("sampling", "prompt", "output", "best"),
    [
        (Sampling(max_tokens=9, temperature=0), (3,), (), 0),
        (Sampling(max_tokens=9, temperature=0, logit_bias={2: 5.0}), (3,), (), 2),
        (Sampling(max_tokens=9, temperature=0, presence_penalty=2.0), (3,), (0,), 1),
        (Sampling(max_tokens=9, temperature=0, presence_penalty=2.0), (0,), (), 0),  # of output alone
        (Sampling(max_tokens=9, temperature=0, frequency_penalty=0.3), (3,), (0, 0), 1),
        (Sampling(max_tokens=9, temperature=0, frequency_penalty=0.2), (3,), (0,), 0),
        (Sampling(max_tokens=9, temperature=0, repetition_penalty=3.0), (0,), (), 1),  # of the prompt too
        (Sampling(max_tokens=9, temperature=0, min_tokens=1, stop_token_ids=(0,)), (3,), (), 1),
        (Sampling(max_tokens=9, temperature=0, min_tokens=1, stop_token_ids=(0,)), (3,), (3,), 0),
    ],
)
def test_each_parameter_moves_the_best_token(
    sampling: Sampling, prompt: tuple[int, ...], output: tuple[int, ...], best: int
) -> None:
    sampler = Sampler([], [])
    assert sampler.sample(LOGITS.clone(), [make_sequence(sampling, prompt, output)]).tolist() == [best]


def test_suppressed_ids_are_never_sampled() -> None:
    sampler = Sampler([0, 1], [])
    assert sampler.sample(LOGITS.clone(), [make_sequence(Sampling(max_tokens=1, temperature=0))]).tolist() == [2]
    assert [i for i, _ in sampler.candidates(LOGITS[0], 2)] == [2, 3]


def test_the_end_of_sequence_waits_for_min_tokens() -> None:
    sampler = Sampler([], [0])
    early = make_sequence(Sampling(max_tokens=9, temperature=0, min_tokens=2), output=(3,))
    late = make_sequence(Sampling(max_tokens=9, temperature=0, min_tokens=2), output=(3, 3))
    assert sampler.sample(LOGITS.repeat(2, 1), [early, late]).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("sampling", "greedy"),
    [
        (Sampling(max_tokens=9, temperature=0), True),
        (Sampling(max_tokens=9, temperature=0, top_k=3, top_p=0.5, seed=1), True),
        (Sampling(max_tokens=9), False),
        (Sampling(max_tokens=9, temperature=0, beam_width=2), False),
        (Sampling(max_tokens=9, temperature=0, min_tokens=2), False),
        (Sampling(max_tokens=9, temperature=0, logit_bias={1: 2.0}), False),
        (Sampling(max_tokens=9, temperature=0, repetition_penalty=1.1), False),
        (Sampling(max_tokens=9, temperature=0, presence_penalty=0.1), False),
        (Sampling(max_tokens=9, temperature=0, frequency_penalty=0.1), False),
    ],
)
def test_sequences_without_other_parameters_are_greedy(sampling: Sampling, greedy: bool) -> None:
    assert is_greedy(make_sequence(sampling, output=(1,))) is greedy


def test_the_greedy_token_is_the_sampled_one() -> None:
    logits, sampler = torch.randn(5, 40), Sampler([7, 39], [3])
    logits[0, 7] = logits[1, 39] = 9
    sequences = [make_sequence(Sampling(max_tokens=1, temperature=0)) for _ in logits]
    expected = sampler.sample(logits.clone(), sequences)
    token_ids, is_finite = sampler.greedy(logits)
    assert torch.equal(token_ids, expected)
    assert is_finite.all()
