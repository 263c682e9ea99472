"""Tests of training on shots that attend alone: the forward is the reference's, and targets are what a query can tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
import torch

from model.batch import NO_CACHE, span_offsets, span_positions, whole_sequences
from model.config import AlonePositions
from model.prompt import EndOfChunk, Media, Text
from model.reference import log_probs
from tests.tiny_models import CONFIGS, Family, prompt_tokenizer, tiny_model, with_alone_positions
from tests.training.test_batch import CPU
from tests.training.test_examples import tokens
from training.batch import collate
from training.bridge import BridgeLoss, freeze
from training.config import SetConfig
from training.default.matching import earlier_names_in_sequence
from training.examples import Example, Limits, Tokens, tokenize
from training.forms import FormStream, attend_alone
from training.mixture import PreparedExample

# two shots and two queries, after a text
LENGTHS, SPANS = (2, 3, 4, 3, 2), (0, 1, 2, -1, -2)
IDS = list(range(1, sum(LENGTHS) + 1))
TOKEN_SPANS = [span for length, span in zip(LENGTHS, SPANS, strict=True) for _ in range(length)]
SLOTS = [part - 1 for part, length in enumerate(LENGTHS) for _ in range(length)]


def part(values: Sequence[int], *numbers: int) -> list[int]:
    """Return the values of some of the parts."""
    starts = [sum(LENGTHS[:number]) for number in range(len(LENGTHS))]
    return [v for number in numbers for v in values[starts[number] : starts[number] + LENGTHS[number]]]


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("alone_positions", ["restart", "in_a_row"])
@pytest.mark.parametrize("family", ["openflamingo", "flamingo", "idefics"])
def test_each_query_has_the_log_probabilities_of_its_own_prompt(
    family: Family, alone_positions: AlonePositions, with_gradient: bool
) -> None:
    model = tiny_model(with_alone_positions(CONFIGS[family], alone_positions))
    pages = model.fresh_media(model.encode_media(torch.randn(4, 1, 3, 8, 8)))
    plain = ([7, 8, 9, 10, 11], [-1, 0, 0, 1, 1])
    spans = [[0] * 5, TOKEN_SPANS]
    batch = whole_sequences([plain[0], IDS], [plain[1], SLOTS], spans=spans, alone_positions=alone_positions)
    with torch.set_grad_enabled(with_gradient):
        logs = model(batch, NO_CACHE, pages).float().log_softmax(-1).detach()
    torch.testing.assert_close(logs[:5], log_probs(model, *plain, pages), atol=1e-5, rtol=0)
    for query in (3, 4):
        ids, slots = part(IDS, 0, 1, 2, query), part(SLOTS, 0, 1, 2, query)
        alone = log_probs(model, ids, slots, pages, span_starts=[0, 2, 5, 9])
        rows = torch.tensor(part(range(len(IDS)), query)) + 5
        torch.testing.assert_close(logs[rows], alone[9:], atol=1e-5, rtol=0)


def test_positions_restart() -> None:
    assert span_positions(TOKEN_SPANS, "restart") == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 6, 7]
    assert span_positions([0] * 4, "restart") == [0, 1, 2, 3]


def test_queries_see_shots_in_a_row() -> None:
    positions, offsets = span_positions(TOKEN_SPANS, "in_a_row"), span_offsets(TOKEN_SPANS)
    assert positions == [0, 1, 2, 3, 4, 2, 3, 4, 5, 9, 10, 11, 9, 10]
    assert [position + offset for position, offset in zip(positions, offsets, strict=True)][:9] == list(range(9))
    assert offsets[9:] == [0] * 5


def test_only_sequences_whose_shots_attend_alone_have_offsets() -> None:
    media = {bytes([n]): torch.randn(1, 3, 8, 8) for n in range(4)}
    batch = collate([alone(WORDS), sequence(WORDS)], media, CPU, alone_positions="in_a_row").batch
    starts = batch.query_starts.tolist()
    assert batch.seen_positions[starts[1] :].tolist() == list(range(starts[2] - starts[1]))
    spans = torch.tensor(alone(WORDS).spans)
    shots = int((spans > 0).sum())
    assert batch.seen_positions[:shots].tolist() == list(range(shots))
    assert batch.positions[: starts[1]][spans == -1].tolist()[0] == shots


def test_the_gradient_does_not_depend_on_the_other_sequences() -> None:
    loss = BridgeLoss(tiny_model(CONFIGS["flamingo"]))
    freeze(loss.flamingo, torch.float32)
    first, second = alone(WORDS), replace(alone(WORDS), spans=())
    media = {bytes([n]): torch.randn(1, 3, 8, 8) for n in range(4)}

    def gradient(*sequences: Tokens) -> list[torch.Tensor]:
        loss.zero_grad()
        loss(collate(sequences, media, CPU)).backward()
        return [p.grad.clone() for p in loss.parameters() if p.grad is not None]

    separate = [a + b for a, b in zip(gradient(first), gradient(second), strict=True)]
    torch.testing.assert_close(gradient(first, second), separate, atol=1e-4, rtol=1e-3)


# four images, of which the last two repeat names
WORDS = ("red", "blue", "red", "blue")


def sequence(words: Sequence[str], learned: Sequence[bool] = (False, False, True, True)) -> Tokens:
    segments = [s for n, word in enumerate(words) for s in (Media(bytes([n])), Text(word), EndOfChunk())]
    answers = {3 * n + k for n, is_learned in enumerate(learned) if is_learned for k in (1, 2)}
    names = frozenset(3 * n + 1 for n in range(len(words)))
    example = Example(name="", segments=tuple(segments), answers=frozenset(answers), names=names)
    return tokenize(example, prompt_tokenizer(), Limits(max_tokens=200, max_media=10), Random(0))


def alone(words: Sequence[str], num_shots: int = 2, **fields: Sequence[bool]) -> Tokens:
    class Fixed(Random):
        def randrange(self, *_: int) -> int:  # type: ignore[override]
            return num_shots

    return attend_alone(sequence(words, **fields), Fixed())


def test_the_first_images_are_shots_and_the_others_queries() -> None:
    assert list(dict.fromkeys(alone(WORDS).spans)) == [1, 2, -1, -2]
    assert list(dict.fromkeys(alone(WORDS, 3).spans)) == [1, 2, 3, -1]


def test_targets_are_those_of_queries() -> None:
    result = alone(WORDS, learned=(True, True, True, True))
    assert {span for span, flag in zip(result.spans, result.target, strict=True) if flag} == {-1, -2}


def test_a_name_that_no_shot_has_is_no_target() -> None:
    result = alone(("red", "blue", "green", "blue"), learned=(False, False, True, True))
    assert {span for span, flag in zip(result.spans, result.target, strict=True) if flag} == {-2}
    result = alone(("red", "blue", "bluer", "blue"), learned=(False, False, True, True))
    assert {span for span, flag in zip(result.spans, result.target, strict=True) if flag} == {-2}


def test_a_sequence_that_would_lose_all_targets_stays() -> None:
    words = ("red", "blue", "bluer", "redder")
    assert alone(words) == sequence(words)


def test_a_sequence_with_a_single_image_stays() -> None:
    single = sequence(WORDS[:1], (True,))
    assert attend_alone(single, Random(0)) == single


@pytest.mark.parametrize("seed", range(10))
def test_text_of_the_next_image_stays(seed: int) -> None:
    segments = [part for name in "abc" for part in (Media(name.encode()), Text(name * 3), EndOfChunk())]
    # windows at all positions, such as one that ends with an image
    ahead = tokens(*segments, limits=Limits(max_tokens=9, max_media=5, p_next=1), seed=seed)
    assert ahead.num_targets
    assert attend_alone(ahead, Random(seed)) == ahead


def test_names_that_a_query_reads_are_those_of_shots() -> None:
    media = {bytes([n]): torch.randn(1, 3, 8, 8) for n in range(4)}
    batch = collate([alone(WORDS), sequence(WORDS)], media, CPU)
    visible = earlier_names_in_sequence(batch).long().tolist()
    shots = [[0] * 8, [0] * 8, [1, 1] + [0] * 6, [1, 1] + [0] * 6]
    assert visible == shots + [[0] * 4 + [1] * n + [0] * (4 - n) for n in range(4)]


class Numbered:
    """A stream of equal sequences, whose media name their number."""

    def __init__(self) -> None:
        self.num_taken = 0

    def take(self) -> PreparedExample:
        self.num_taken += 1
        return PreparedExample(sequence(WORDS), {})

    def state(self) -> int:
        return self.num_taken

    def load_state(self, state: int) -> None:
        self.num_taken = state


def test_a_share_of_a_stream_has_the_form_and_continues_after_a_restart() -> None:
    stream = FormStream(Numbered(), 0.5, "1/pairs/0")
    spans = [stream.take().tokens.spans for _ in range(40)]
    assert 10 < sum(map(bool, spans)) < 30
    state = stream.state()
    later = [stream.take().tokens.spans for _ in range(20)]
    resumed = FormStream(Numbered(), 0.5, "1/pairs/0")
    resumed.load_state(state)
    assert [resumed.take().tokens.spans for _ in range(20)] == later
    assert later != spans[:20]


def test_a_share_is_between_0_and_1() -> None:
    with pytest.raises(ValueError, match="set a: p_alone is 2, must be between 0 and 1"):
        SetConfig(name="a", kind="pairs", shards="", p_alone=2)
