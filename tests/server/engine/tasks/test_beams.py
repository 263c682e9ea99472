"""Beam search: it conforms to its definition, whatever else runs."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from model.flamingo import Flamingo
from model.reference import encode, log_probs
from server.engine.device.sampler import Result
from server.engine.tasks.beams import BeamAnswers
from server.wire import Abort, Generate, Outbound, Sampling
from tests.engine_client import (
    CONFIG,
    FEW_SHOT,
    IMAGE_TOKEN,
    MODELS,
    Prompt,
    assert_all_released,
    assert_equals_reference,
    client,
)
from tests.tiny_models import FAMILIES, Family, prompt_tokenizer

NUM_IDS = MODELS["flamingo"].config.language_model.num_token_ids


def test_a_beam_search_ignores_the_abort_of_one_answer() -> None:
    answer = client("flamingo")
    answer.engine.add(FEW_SHOT.request("a", Sampling(max_tokens=4, beam_width=3, n=2)))
    answer.step()
    answer.engine.abort(Abort("a", 1))
    answer.run()
    assert {token.index for token in answer.tokens["a"]} == {0, 1}
    assert_all_released(answer.engine)


def beam_oracle(model: Flamingo, request: Generate, pixels: list[Tensor], eos: set[int]) -> list[list[int]]:
    """Run beam search as it is defined, with the whole prompt computed again for every beam."""
    sampling, media = request.sampling, encode(model, pixels)
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    for length in range(1, sampling.max_tokens + 1):
        grown = []
        for score, tokens in live:
            index = request.prompt.media_index + [request.prompt.media_index[-1]] * len(tokens)
            row = log_probs(model, request.prompt.token_ids + tokens, index, media)[-1].clone()
            row[IMAGE_TOKEN] = -torch.inf
            if length <= sampling.min_tokens:
                row[list(eos)] = -torch.inf
            grown += [(score + float(lp), [*tokens, i]) for i, lp in enumerate(row)]
        grown.sort(key=lambda g: -g[0])
        best = grown[: 2 * sampling.beam_width]
        ended += [
            (score / length**sampling.length_penalty, tokens)
            for score, tokens in best[: sampling.beam_width]
            if tokens[-1] in eos
        ]
        live = [g for g in best if g[1][-1] not in eos][: sampling.beam_width]
        ended = sorted(ended, key=lambda e: -e[0])[: sampling.beam_width]
        full = len(ended) == sampling.beam_width
        if full and ended[-1][0] >= live[0][0] / length**sampling.length_penalty:
            break
    else:
        ended += [(score / sampling.max_tokens**sampling.length_penalty, tokens) for score, tokens in live]
    return [tokens for _, tokens in sorted(ended, key=lambda e: -e[0])[: sampling.n]]


# the second prompt gives the same answer twice where a search begins with more than one beam
@pytest.mark.parametrize("prompt", [Prompt(((0, 5), (1, 4))), Prompt(((0, 9),))], ids=["two images", "one image"])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search_matches_its_definition(family: Family, penalty: float, prompt: Prompt) -> None:
    answer = client(family)
    sampling = Sampling(max_tokens=5, beam_width=3, n=2, length_penalty=penalty)
    request = prompt.request("a", sampling)
    answer.engine.add(request)
    answer.engine.add(FEW_SHOT.request("neighbour"))
    answer.run()
    eos = set(prompt_tokenizer().eos_ids)
    expected = beam_oracle(MODELS[family], request, prompt.pixels(MODELS[family]), eos)
    answers = [[t.token_id for t in answer.tokens["a"] if t.index == i] for i in range(2)]
    assert answers == expected
    assert_equals_reference(family, FEW_SHOT, answer, "neighbour")
    assert_all_released(answer.engine)


def test_beams_do_not_end_before_min_tokens() -> None:
    model, prompt = MODELS["flamingo"], Prompt(((0, 5), (1, 4)))
    stop_ids = tuple(range(0, NUM_IDS, 2))
    sampling = Sampling(max_tokens=5, beam_width=3, n=2, stop_token_ids=stop_ids)
    short, long = (prompt.request("a", replace(sampling, min_tokens=count)) for count in (0, 4))
    answers = []
    for request in (short, long):
        answer = client("flamingo")
        answer.engine.add(request)
        answer.run()
        answers.append([[t.token_id for t in answer.tokens["a"] if t.index == i] for i in range(2)])
    assert len(answers[0][0]) < 4
    assert answers[1] == beam_oracle(model, long, prompt.pixels(model), {*stop_ids, *prompt_tokenizer().eos_ids})


def test_a_search_is_over_when_every_candidate_ends_a_beam() -> None:
    answer = client("flamingo")
    sampling = Sampling(max_tokens=5, beam_width=2, n=2, stop_token_ids=tuple(range(NUM_IDS)))
    answer.engine.add(FEW_SHOT.request("a", sampling))
    answer.run()
    assert [(t.index, t.finish_reason) for t in answer.tokens["a"]] == [(0, "stop"), (1, "stop")]
    assert_all_released(answer.engine)


def test_beams_report_the_likeliest_tokens() -> None:
    beams, greedy = client("flamingo"), client("flamingo")
    sampling = Sampling(max_tokens=4, temperature=0, ignore_eos=True, logprobs=2)
    beams.engine.add(FEW_SHOT.request("a", replace(sampling, beam_width=1)))
    greedy.engine.add(FEW_SHOT.request("a", sampling))
    beams.run()
    greedy.run()
    tops = [[token.logprob.top for token in answer.tokens["a"] if token.logprob] for answer in (beams, greedy)]
    assert [[i for i, _ in top] for top in tops[0]] == [[i for i, _ in top] for top in tops[1]]
    assert [top[0][0] for top in tops[0]] == beams.ids("a")


def test_beams_with_few_blocks_finish() -> None:
    config = dataclasses.replace(CONFIG, block_size=2, num_blocks=32, max_model_len=40)
    answer = client("flamingo", config)
    sampling = Sampling(max_tokens=8, beam_width=3, ignore_eos=True)
    alone = client("flamingo")
    for i in range(4):
        request = Prompt(((i, 7),)).request(str(i), sampling)
        answer.engine.add(request)
        alone.engine.add(request)
    answer.run()
    alone.run()
    for i in range(4):
        assert answer.ids(str(i)) == alone.ids(str(i))
    assert_all_released(answer.engine)


def test_beams_that_never_fit_are_refused() -> None:
    answer = client("flamingo", dataclasses.replace(CONFIG, num_blocks=10, max_model_len=40))
    answer.engine.add(Prompt(((0, 7),)).request("a", Sampling(max_tokens=30, beam_width=4)))
    answer.run()
    assert "4 beams need" in answer.finished["a"].error


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_a_beam_that_is_preempted_while_it_waits_for_the_others_counts_once(seed: int) -> None:
    draw = random.Random(seed)
    config = dataclasses.replace(CONFIG, num_blocks=20, max_model_len=48)
    answer, alone = client("flamingo", config), client("flamingo")
    for number in range(4):
        prompt = Prompt(tuple((draw.randint(0, 4), draw.randint(2, 7)) for _ in range(2)))
        if number % 2:
            request = prompt.request(f"beams {number}", Sampling(max_tokens=8, beam_width=4, n=3, ignore_eos=True))
            alone.engine.add(request)
        else:
            request = prompt.request(f"others {number}", Sampling(max_tokens=12, temperature=1, n=4, ignore_eos=True))
        answer.engine.add(request)
    answer.run(2000)
    alone.run()
    assert answer.engine.residents.num_preemptions
    for name in ("beams 1", "beams 3"):
        assert answer.ids(name) == alone.ids(name)
    assert_all_released(answer.engine)


def test_a_report_from_before_the_latest_token_is_not_used() -> None:
    """A beam that is computed again may report in the same step as the last of the others, and after it."""
    answer, alone = client("flamingo"), client("flamingo")
    request = FEW_SHOT.request("a", Sampling(max_tokens=6, beam_width=3, n=2, ignore_eos=True))
    for engine in (answer.engine, alone.engine):
        engine.add(request)
    task = answer.engine._sequence_tasks["a"]
    assert isinstance(task, BeamAnswers)
    rounds: list[list[Result]] = []

    def hold(result: Result) -> Iterable[Outbound]:
        rounds[-1].append(result)
        return []

    advance = task._advance
    while len(rounds) < 3:  # the first has the prompt's beam, the others have all
        rounds.append([])
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(task, "_advance", hold)
            while not rounds[-1]:
                answer.step()
        if len(rounds) < 3:
            for result in rounds[-1]:
                advance(result)
    late = next(result for result in rounds[1] if result.row.sequence in task._live.values())
    again = next(result for result in rounds[2] if result.row.sequence is late.row.sequence)
    for result in [late, *(result for result in rounds[2] if result is not again)]:
        advance(result)
    assert late.row.sequence.num_output_tokens == 2  # it waits for the beam's own report
    advance(again)
    answer.run()
    alone.run()
    assert answer.ids("a") == alone.ids("a")
