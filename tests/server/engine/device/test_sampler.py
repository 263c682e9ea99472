"""Sampling: truncation keeps the right tokens, draws follow the distribution, and each parameter has its defined effect."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.rows import greedy_argmax
from model.prompt import EncodedPrompt
from server.engine.device.choice import draw, parameters
from server.engine.device.sampler import NOT_FINITE, NOTHING_PERMITTED, Result, Sampler, logit_positions
from server.engine.plan import Row
from server.engine.sequence import QueueOrder, Sequence
from server.schemas.generation import GenerationFields
from server.wire import Sampling

PROBS = torch.tensor([0.4, 0.3, 0.2, 0.1])
LOGITS = PROBS.log()[None]


def make_sequence(sampling: Sampling, prompt: tuple[int, ...] = (0,), output: tuple[int, ...] = ()) -> Sequence:
    encoded = EncodedPrompt(token_ids=list(prompt), media_index=[-1] * len(prompt), media=[])
    sequence = Sequence("r", encoded, sampling, QueueOrder())
    for token_id in output:
        sequence.append(token_id)
    return sequence


def sampled(sampler: Sampler, logits: torch.Tensor, sequences: list[Sequence]) -> list[Result]:
    """Return the results of sequences whose next tokens are sampled in one step."""
    rows = [Row(sequence, len(sequence.token_ids) - 1, 1, samples=True) for sequence in sequences]
    return sampler.read(rows, [logit_positions(row) for row in rows], logits.clone()).results()


def drawn(sampling: Sampling, uniform: float) -> int:
    cut = bool(sampling.top_k or sampling.top_p < 1 or sampling.min_p)
    return int(draw(LOGITS, parameters([sampling], [uniform]), truncate=cut)[0])


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(max_tokens=1), [0, 1, 2, 3]),
        (Sampling(max_tokens=1, top_k=2), [0, 1]),
        (Sampling(max_tokens=1, top_p=0.4), [0]),
        (Sampling(max_tokens=1, top_p=0.41), [0, 1]),
        (Sampling(max_tokens=1, top_p=1e-9), [0]),
        (Sampling(max_tokens=1, top_p=0), [0]),
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
    together = draw(rows, parameters(samplings, uniform), truncate=cut).tolist()
    alone = [
        int(draw(rows[i : i + 1], parameters([samplings[i]], [uniform[i]]), truncate=cut)[0])
        for i in range(len(uniform))
    ]
    assert together == alone


@pytest.mark.parametrize(
    ("sampling", "prompt", "output", "best"),
    [
        (Sampling(max_tokens=9, temperature=0), (3,), (), 0),
        (Sampling(max_tokens=9, temperature=0, logit_bias={2: 5.0}), (3,), (), 2),
        (Sampling(max_tokens=9, temperature=0, presence_penalty=2.0), (3,), (0,), 1),
        (Sampling(max_tokens=9, temperature=0, presence_penalty=2.0), (0,), (), 0),  # of output alone
        (Sampling(max_tokens=9, temperature=0, frequency_penalty=0.2), (3,), (0, 0), 1),
        (Sampling(max_tokens=9, temperature=0, frequency_penalty=0.2), (3,), (0,), 0),
        (Sampling(max_tokens=9, temperature=0, repetition_penalty=3.0), (0,), (), 1),  # of the prompt too
        (Sampling(max_tokens=9, temperature=0, min_tokens=1, stop_token_ids=(0,)), (3,), (), 1),
        (Sampling(max_tokens=9, temperature=0, min_tokens=1, stop_token_ids=(0,)), (3,), (3,), 0),
    ],
)
def test_each_parameter_moves_the_best_token(
    sampling: Sampling, prompt: tuple[int, ...], output: tuple[int, ...], best: int
) -> None:
    (result,) = sampled(Sampler([], []), LOGITS, [make_sequence(sampling, prompt, output)])
    assert (result.token_id, result.error) == (best, "")


@pytest.mark.parametrize("logprobs", [None, 0])
def test_suppressed_ids_are_never_sampled(logprobs: int | None) -> None:
    sampler = Sampler([0, 1], [])
    sampling = Sampling(max_tokens=1, temperature=0, logprobs=logprobs)
    (result,) = sampled(sampler, LOGITS, [make_sequence(sampling)])
    assert result.token_id == 2
    assert sampler.candidates(LOGITS, 2)[1].tolist() == [[2, 3]]


def test_the_end_of_sequence_waits_for_min_tokens() -> None:
    sampler = Sampler([], [0])
    early = make_sequence(Sampling(max_tokens=9, temperature=0, min_tokens=2), output=(3,))
    late = make_sequence(Sampling(max_tokens=9, temperature=0, min_tokens=2), output=(3, 3))
    assert [result.token_id for result in sampled(sampler, LOGITS.repeat(2, 1), [early, late])] == [1, 0]


@pytest.mark.parametrize(
    ("sampling", "greedy"),
    [
        (Sampling(max_tokens=9, temperature=0), True),
        (Sampling(max_tokens=9, temperature=0, top_k=3, top_p=0.5, seed=1), True),
        (Sampling(max_tokens=9), False),
        (Sampling(max_tokens=9, temperature=1e-5), False),
        (Sampling(max_tokens=9, temperature=0.99e-5, top_p=0.9), True),
        (Sampling(max_tokens=9, temperature=0, beam_width=2), False),
        (Sampling(max_tokens=9, temperature=0, min_tokens=2), False),
        (Sampling(max_tokens=9, temperature=0, logit_bias={1: 2.0}), False),
        (Sampling(max_tokens=9, temperature=0, repetition_penalty=1.1), False),
        (Sampling(max_tokens=9, temperature=0, presence_penalty=0.1), False),
        (Sampling(max_tokens=9, temperature=0, frequency_penalty=0.1), False),
    ],
)
def test_sequences_without_other_parameters_are_greedy(sampling: Sampling, greedy: bool) -> None:
    assert make_sequence(sampling, output=(1,)).is_greedy is greedy


def test_the_greedy_token_is_the_one_next_to_log_probabilities() -> None:
    logits, sampler = torch.randn(5, 40), Sampler([7, 39], [3])
    logits[0, 7] = logits[1, 39] = 9
    sequences = [make_sequence(Sampling(max_tokens=1, temperature=0, logprobs=0)) for _ in logits]
    expected = [result.token_id for result in sampled(sampler, logits, sequences)]
    token_ids, is_finite = sampler.greedy(logits)
    assert token_ids.tolist() == expected
    assert is_finite.all()


# no legal number may break a step


VOCABULARY = 12


def read(samplings: list[Sampling], logits: torch.Tensor, output: tuple[int, ...] = ()) -> list[Result]:
    """Return the results of rows that sample their next tokens in one step."""
    return sampled(Sampler([7], [3]), logits, [make_sequence(sampling, (0, 1, 2), output) for sampling in samplings])


ROW = torch.tensor([1.5, 0.5, -2.0, 0.25, 3.0, -1.0, 0.75, 9.0, -4.0, 2.0, 0.0, 1.0])


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=4, repetition_penalty=1e-38),
        Sampling(max_tokens=4, repetition_penalty=5e-324, logit_bias={0: -100.0, 1: 100.0}),
        Sampling(max_tokens=4, temperature=1e-38, top_p=0.9),
        Sampling(max_tokens=4, temperature=1e-40, top_k=5),
        Sampling(max_tokens=4, temperature=5e-324),
        Sampling(max_tokens=4, temperature=1e-5, repetition_penalty=1e-38),
    ],
)
def test_tiny_numbers_give_the_token_of_their_limit(sampling: Sampling) -> None:
    shaped = ROW.clone()
    if sampling.repetition_penalty < 1:
        shaped[3:] = -torch.inf  # a seen token with a positive logit has all the probability
    shaped[7] = -torch.inf
    other = Sampling(max_tokens=4, temperature=0.5, seed=1)
    result, neighbour = read([sampling, other], ROW.repeat(2, 1))
    expected = 1 if sampling.logit_bias else int(shaped.argmax())
    assert (result.error, result.token_id) == ("", expected)
    assert neighbour.token_id == read([other], ROW[None])[0].token_id


def legal_floats(name: str) -> st.SearchStrategy[float]:
    """Return what the field of a request takes, with the extremes of both widths of floats drawn often."""
    bounds: dict[str, float] = {}
    for limit in GenerationFields.model_fields[name].metadata:
        for kind in ("ge", "gt", "le"):
            if hasattr(limit, kind):
                bounds[kind] = getattr(limit, kind)
    low, high = bounds.get("ge", bounds.get("gt", 0.0)), bounds["le"]
    extremes = [1e-45, 1e-40, 1.2e-38, 1e-38, 5e-324, 1e-20, 1e-8, 1e-5, 1e-3, 1 - 2**-24, 1 - 2**-53, 1 + 2**-23, high]
    legal = [x for value in extremes for x in (value, -value) if low <= x <= high]
    return st.sampled_from(legal) | st.floats(low, high, exclude_min="gt" in bounds)


@st.composite
def legal_samplings(draw: st.DrawFn) -> Sampling:
    ids = st.integers(0, VOCABULARY - 1)
    return Sampling(
        max_tokens=9,
        min_tokens=draw(st.integers(0, 9)),
        temperature=draw(legal_floats("temperature") | st.just(0.0)),
        top_p=draw(legal_floats("top_p")),
        top_k=draw(st.sampled_from([0, 1, 2, VOCABULARY, 2**31 - 1])),
        min_p=draw(legal_floats("min_p")),
        presence_penalty=draw(legal_floats("presence_penalty")),
        frequency_penalty=draw(legal_floats("frequency_penalty")),
        repetition_penalty=draw(legal_floats("repetition_penalty")),
        logit_bias=draw(st.dictionaries(ids, st.floats(-100, 100), max_size=4)),
        seed=draw(st.none() | st.integers(-(2**63), 2**63 - 1)),
        stop_token_ids=tuple(draw(st.lists(ids, max_size=VOCABULARY))),
        logprobs=draw(st.none() | st.integers(0, 20)),
        beam_width=draw(st.sampled_from([0, 0, 3, 16])),
    )


LARGE = float(torch.finfo(torch.float32).max)
finite_logits = st.lists(
    st.floats(-30, 30, width=32) | st.sampled_from([0.0, 1e-45, -1e-38, LARGE, -LARGE, -torch.inf]),
    min_size=VOCABULARY,
    max_size=VOCABULARY,
).filter(lambda row: max(row) > -torch.inf)
broken_logits = st.lists(
    st.sampled_from([0.0, torch.nan, torch.inf, -torch.inf]), min_size=VOCABULARY, max_size=VOCABULARY
)


def test_a_penalty_forbids_no_token() -> None:
    """The only permitted token is the least likely one, and has been generated before."""
    sampling = Sampling(max_tokens=9, min_tokens=9, repetition_penalty=2.0, stop_token_ids=tuple(range(1, VOCABULARY)))
    (result,) = read([sampling], torch.tensor([[-LARGE, *[0.0] * (VOCABULARY - 1)]]))
    assert (result.error, result.token_id) == ("", 0)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.tuples(legal_samplings(), finite_logits | broken_logits), min_size=1, max_size=5),
    st.lists(st.integers(0, VOCABULARY - 1), max_size=8),
)
def test_every_row_has_a_legal_token_or_an_error_of_its_own(
    rows: list[tuple[Sampling, list[float]]], output: list[int]
) -> None:
    logits = torch.tensor([row for _, row in rows])
    for (sampling, row), result in zip(rows, read([s for s, _ in rows], logits, tuple(output)), strict=True):
        banned = {7} | ({3, *sampling.stop_token_ids} if len(output) < sampling.min_tokens else set())
        permitted = {i for i, logit in enumerate(row) if logit > -torch.inf} - banned
        if not torch.tensor(row).amax().isfinite():
            assert (result.error, result.param) == (NOT_FINITE, "")
        elif not permitted:
            assert (result.error, result.param) == (f"min_tokens: {NOTHING_PERMITTED}", "min_tokens")
        else:
            assert not result.error
            assert result.token_id in permitted


@pytest.mark.parametrize("sampling", [Sampling(max_tokens=1), Sampling(max_tokens=1, top_k=2)])
def test_a_row_that_is_not_finite_fails_alone(sampling: Sampling) -> None:
    logits = ROW.repeat(3, 1)
    logits[1] = torch.nan
    before, broken, after = read([sampling] * 3, logits)
    assert (broken.error, before.error, after.error) == (NOT_FINITE, "", "")


def read_proposed(proposed: list[int], logits: torch.Tensor, **fields: int) -> list[Result]:
    sequence = make_sequence(Sampling(max_tokens=9, temperature=0.0, **fields), (0, 1, 2), (4,))  # type: ignore[arg-type]
    row = Row(sequence, 3, 1, samples=True, proposed=proposed)
    return Sampler([7], [3]).read([row], [logit_positions(row)], logits.clone()).results()


def likely(*token_ids: int) -> torch.Tensor:
    """Return logits after which these tokens are the most likely ones."""
    return torch.nn.functional.one_hot(torch.tensor(token_ids), VOCABULARY).float()


@pytest.mark.parametrize("fields", [{}, {"logprobs": 1}])
@pytest.mark.parametrize(
    ("proposed", "token_ids", "num_rejected"),
    [([5, 6], [5, 6, 8], 0), ([5, 1], [5, 6], 1), ([1, 6], [5], 2), ([5], [5, 6], 0), ([], [5], 0)],
)
def test_proposed_tokens_are_accepted_up_to_the_first_other_one(
    proposed: list[int], token_ids: list[int], num_rejected: int, fields: dict[str, int]
) -> None:
    results = read_proposed(proposed, likely(5, 6, 8)[: 1 + len(proposed)], **fields)
    assert [result.token_id for result in results] == token_ids
    assert [result.num_rejected for result in results] == [0] * (len(results) - 1) + [num_rejected]
    assert sum(result.is_proposed for result in results) == len(proposed) - num_rejected
    assert all((result.logprob is not None) == bool(fields) for result in results)


def test_proposed_tokens_are_read_as_alone_next_to_a_prompt_and_a_random_row() -> None:
    def rows() -> list[Row]:
        prompt = make_sequence(Sampling(max_tokens=9, seed=1, logprobs=0, prompt_logprobs=2), (0, 1, 2, 5))
        greedy = make_sequence(Sampling(max_tokens=9, temperature=0.0, logprobs=1), (0, 1, 2), (4,))
        other = make_sequence(Sampling(max_tokens=9, seed=2, logprobs=3), (0,))
        return [Row(prompt, 0, 4, True), Row(greedy, 3, 1, True, proposed=[5, 1]), Row(other, 0, 1, True)]

    def of(results: list[Result]) -> list[object]:
        return [(r.number, r.token_id, r.logprob, r.prompt_logprobs, r.error) for r in results]

    logits = torch.randn(8, VOCABULARY, generator=torch.Generator().manual_seed(3))
    logits[4:7] += 9 * likely(5, 6, 8)
    parts, sampler = logits.split([4, 3, 1]), Sampler([7], [3])
    alone = [
        sampler.read([row], [logit_positions(row)], part.clone()).results()
        for row, part in zip(rows(), parts, strict=True)
    ]
    assert [len(results) for results in alone] == [1, 2, 1]
    assert len(alone[0][0].prompt_logprobs) == 3
    together = sampler.read(rows(), list(map(logit_positions, rows())), logits.clone()).results()
    assert of(together) == [each for results in alone for each in of(results)]


@pytest.mark.parametrize("fields", [{}, {"logprobs": 1}])
def test_what_follows_a_rejected_token_need_not_be_finite(fields: dict[str, int]) -> None:
    logits = likely(5, 6, 8)
    logits[2] = torch.nan
    assert [(result.token_id, result.error) for result in read_proposed([5, 1], logits, **fields)] == [(5, ""), (6, "")]
    (failed,) = read_proposed([5, 6], logits, **fields)
    assert failed.error == NOT_FINITE


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_greedy_token_of_a_broken_row_is_in_the_vocabulary(value: float) -> None:
    token_ids, is_finite = greedy_argmax(torch.full((2, 40), value), torch.tensor([7]))
    assert all(0 <= token_id < 40 for token_id in token_ids.tolist())
    assert not is_finite.any()


def test_log_probabilities_in_groups_of_rows_are_those_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = make_sequence(Sampling(max_tokens=1, prompt_logprobs=2), tuple(range(11)))
    prompt = EncodedPrompt(token_ids=list(range(11)), media_index=[-1] * 11, media=[])
    targets = Sequence("t", prompt, Sampling(max_tokens=0), QueueOrder(), targets={at: [at, 3] for at in range(2, 11)})
    rows = [Row(sequence, 0, 11, samples=True), Row(targets, 0, 11, samples=True)]
    positions = [logit_positions(row) for row in rows]
    logits = torch.randn(sum(map(len, positions)), VOCABULARY)
    whole = Sampler([], []).read(rows, positions, logits.clone()).results()
    monkeypatch.setattr("server.engine.device.sampler.ROWS_TOGETHER", 4)
    parts = Sampler([], []).read(rows, positions, logits.clone()).results()
    assert [r.prompt_logprobs for r in parts] == [r.prompt_logprobs for r in whole]
    assert [r.target_logprobs for r in parts] == [r.target_logprobs for r in whole]
    assert len(whole[0].prompt_logprobs) == 10
    assert sorted(whole[1].target_logprobs) == list(range(2, 11))
