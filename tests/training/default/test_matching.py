"""Tests of the matching loss: its scores equal the forward's attention, and descent makes them follow the similarity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.self_attention import causal_attention
from model.batch import NO_CACHE, whole_sequences
from model.config import ConfigError
from model.flamingo import Flamingo
from model.language_model import Layer, StepContext
from tests.tiny_models import CONFIGS, KIN_CONFIG, prompt_tokenizer, tiny_model
from training.batch import TrainingBatch, collate
from training.bridge import freeze, trained_parameters
from training.default import episodes as episodes_module
from training.default import matching
from training.default.catalogue import Catalogue
from training.default.discriminants import Discriminants, with_kin
from training.default.episodes import LIMITS, Episodes
from training.default.matching import (
    TextAndMatchingLoss,
    earlier_names_in_batch,
    earlier_names_in_sequence,
    forward_with_scores,
    log_odds_by_word,
    mismatch,
    name_pages,
    probe_sequences,
)
from training.default.states import single_image_prompt
from training.examples import Tokens
from training.mixture import merge_media

HEADS = {1: torch.tensor([0, 3]), 2: torch.tensor([2])}


@pytest.fixture
def model() -> Flamingo:
    return tiny_model(CONFIGS["flamingo"])


@pytest.fixture
def long_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise the limit of tokens, because the tests' tokenizer writes a word in many tokens."""
    for module in (episodes_module, matching):
        monkeypatch.setattr(module, "LIMITS", replace(LIMITS, max_tokens=2048))


@pytest.fixture
def batch(catalogue: Catalogue, long_sequences: None) -> TrainingBatch:
    examples = [Episodes(catalogue, prompt_tokenizer(), 0, 4)(number) for number in range(4)]
    return collate([example.tokens for example in examples], merge_media(examples), torch.device("cpu"))


def test_a_name_begins_after_its_prompt(batch: TrainingBatch) -> None:
    """Check that an image has at most one name, and that a name that is a target begins with the first target."""
    assert batch.batch.media_slot is not None
    pages = batch.batch.media_slot[batch.names].tolist()
    assert len(batch.names) <= int((batch.batch.token_ids == prompt_tokenizer().media_token_id).sum())
    assert min(pages) >= 0
    targets = batch.batch.last_token + 1
    first_targets = targets[~torch.isin(targets - 1, targets)]
    assert torch.isin(batch.names, first_targets).any()
    assert not torch.isin(batch.names, targets[torch.isin(targets - 1, targets)]).any()


def test_the_forward_equals_the_models_forward(
    model: Flamingo, batch: TrainingBatch, discriminants: Discriminants
) -> None:
    loss = matching_loss(model, discriminants)
    media = model.fresh_media(loss.visual_tokens(batch.media))
    x, _ = forward_with_scores(model, batch, media, HEADS)
    logits = model.language_model.logits(x[batch.batch.last_token])
    torch.testing.assert_close(logits, model(batch.batch, NO_CACHE, media))
    words = batch.batch.token_ids[batch.names]
    torch.testing.assert_close(
        model.language_model.logits_of(x, words), model.language_model.logits(x)[:, words], atol=1e-5, rtol=1e-4
    )


def test_a_words_probability_is_divided_among_its_names() -> None:
    """Three names precede the last, two of them with the same word; a correct prediction of the words has no mismatch."""
    words, visible = torch.tensor([7, 8, 7, 9]), torch.ones(4, 4, dtype=torch.bool).tril(-1)
    target = torch.tensor([0.2, 0.5, 0.3, 0.0]).log().expand(4, 4)
    predicted = torch.tensor([0.5, 0.5, 0.5, 0.0]).log().expand(4, 4)  # the word's value, at each of its names
    divergence = mismatch(*log_odds_by_word(predicted, target, visible, words), visible)
    assert float(divergence) < 0.1  # row 2 sees the words in the ratio 2 : 5
    last = torch.zeros(4, 4, dtype=torch.bool)
    last[3, :3] = True
    assert float(mismatch(*log_odds_by_word(predicted, target, last, words), last)) < 1e-5
    biased = predicted + torch.tensor([2.0, 0.0, 2.0, 0.0])
    share = torch.tensor([0.5, 0.5])
    biased_log_probs = (torch.tensor([2.0, 0.0]) + share.log()).log_softmax(0)
    expected = float((share * (share.log() - biased_log_probs)).sum())
    assert float(mismatch(*log_odds_by_word(biased, target, last, words), last)) == pytest.approx(expected, rel=1e-4)


def test_scores_equal_those_of_the_attention(
    model: Flamingo, batch: TrainingBatch, discriminants: Discriminants, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer_scores: list[Tensor] = []

    def spy(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *, scale: float, **plain: None) -> Tensor:
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        layer_scores.append(torch.einsum("qhk,nhk->hqn", query, keys) * scale)
        return causal_attention(query, key, value, starts, scale=scale)

    monkeypatch.setattr("model.language_model.causal_attention", spy)
    media = model.fresh_media(matching_loss(model, discriminants).visual_tokens(batch.media))
    _, scores = forward_with_scores(model, batch, media, HEADS)
    queries, names = batch.names - 1, batch.names
    expected = [
        layer_scores[layer][head][queries][:, names] for layer, heads in HEADS.items() for head in heads.tolist()
    ]
    torch.testing.assert_close(scores, torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_only_earlier_names_of_the_same_sequence_are_visible(batch: TrainingBatch) -> None:
    visible = earlier_names_in_sequence(batch)
    starts = batch.batch.query_starts.tolist()
    for query, row in zip(batch.names.tolist(), visible, strict=True):
        first = max(start for start in starts if start <= query)
        assert row.tolist() == [first <= name < query for name in batch.names.tolist()]


def test_across_sequences_names_of_other_images_at_earlier_positions_are_visible(batch: TrainingBatch) -> None:
    pages = name_pages(batch)
    assert batch.batch.media_slot is not None
    assert pages.tolist() == [int(batch.batch.media_slot[name]) for name in batch.names.tolist()]
    visible = earlier_names_in_batch(batch, pages)
    positions = [int(batch.batch.positions[name]) for name in batch.names.tolist()]
    for query, row in enumerate(visible.tolist()):
        expected = [positions[n] < positions[query] and pages[n] != pages[query] for n in range(len(positions))]
        assert row == expected
    assert int(visible.sum()) > 2 * int(earlier_names_in_sequence(batch).sum())


def test_mismatch_is_zero_for_the_target_distribution() -> None:
    target = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    visible = torch.ones(5, 5, dtype=torch.bool).tril(-1)
    assert float(mismatch((target + torch.arange(5.0)[:, None]).expand(3, 5, 5), target, visible).max()) < 1e-6
    high_elsewhere = torch.where(visible, target, 100.0)
    assert float(mismatch(high_elsewhere, target, visible)) < 1e-6  # masked names do not count
    uniform = torch.zeros(5, 5)
    shares = [target[row, :row].softmax(0) for row in range(2, 5)]  # rows 0 and 1 have no choice
    expected = sum(float((share * (share * len(share)).log()).sum()) for share in shares) / 3
    assert float(mismatch(uniform, target, visible)) == pytest.approx(expected, rel=1e-4)


class FakeLayer:
    """A layer whose first head attends to names, and whose second head attends to its own position."""

    def __init__(self, names: tuple[int, ...]) -> None:
        self.names = names

    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, key = torch.zeros(len(x), 2, 64), torch.zeros(len(x), 2, 64)
        query[:, 0, 0] = key[list(self.names), 0, 0] = 40.0
        positions = torch.arange(len(x))
        query[positions, 1, positions] = key[positions, 1, positions] = 40.0
        return query, key


def test_attention_on_names_identifies_name_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens(token_ids=[0] * 40, media_index=[-1] * 40, target=[False] * 40, media=[], names=(3, 9, 20, 31))
    fake = FakeLayer(tokens.names)
    monkeypatch.setattr(matching, "query_and_key", lambda layer, x, context, rows: fake.queries_and_keys(x[rows]))
    layer, x = tiny_model(CONFIGS["flamingo"]).language_model.layers[0], torch.zeros(80, 32)
    assert isinstance(layer, Layer)
    context = StepContext(whole_sequences([[0] * 80], [[-1] * 80]))
    share = matching._attention_on_names(layer, x, context, [0, 40, 80], [tokens, tokens])
    assert share[0] > 0.99
    assert share[1] < 0.01


def test_the_probes_second_half_repeats_names_of_the_first(long_sequences: None) -> None:
    tokenizer = prompt_tokenizer()
    sequences = probe_sequences(tokenizer)
    assert len(sequences) == matching.NUM_SEQUENCES
    for tokens in sequences:
        name_ids = [tokens.token_ids[name : name + 3] for name in tokens.names]
        assert len(name_ids) == 2 * matching.NUM_WORDS
        assert all(name in name_ids[: matching.NUM_WORDS] for name in name_ids[matching.NUM_WORDS :])


def test_a_model_without_name_heads_is_refused(
    model: Flamingo, discriminants: Discriminants, long_sequences: None
) -> None:
    tokenizer = prompt_tokenizer()
    with pytest.raises(ConfigError, match="attends to earlier names"):
        TextAndMatchingLoss(model, single_image_prompt(tokenizer), discriminants, probe_sequences(tokenizer))


def test_descent_makes_the_heads_attend_to_names_of_similar_images(
    model: Flamingo, batch: TrainingBatch, discriminants: Discriminants
) -> None:
    loss = matching_loss(model, discriminants)
    freeze(model, torch.float32)
    optimizer = torch.optim.Adam([p for _, p in trained_parameters(model)], lr=3e-3)

    def divergence() -> Tensor:
        _, scores = forward_with_scores(model, batch, model.fresh_media(loss.visual_tokens(batch.media)), HEADS)
        target = loss._target_log_odds(batch, name_pages(batch))
        return mismatch(scores, target, earlier_names_in_sequence(batch)).mean()

    first = float(divergence().detach())
    for _ in range(40):
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
    assert float(divergence().detach()) < 0.6 * first


def test_similarity_is_also_that_of_kin(batch: TrainingBatch, discriminants: Discriminants) -> None:
    model = tiny_model(KIN_CONFIG)
    kin = model.vision.kin
    assert kin is not None
    means = torch.stack([media.float().mean((0, 1)) for media in batch.media])
    joint = with_kin(discriminants, kin.coordinates(means))
    loss = matching_loss(model, joint)
    before = loss(batch)
    complete = replace(batch, media=tuple(map(model.vision.with_kin, batch.media)))
    torch.testing.assert_close(loss(complete), before)
    loss.discriminants = replace(joint, directions=joint.directions * (torch.arange(joint.directions.shape[1]) < 16))
    assert not torch.isclose(loss(batch), before, rtol=1e-4)


def matching_loss(model: Flamingo, discriminants: Discriminants) -> TextAndMatchingLoss:
    """Return the loss of a tiny model with fixed heads, because no head of a random model attends to names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "find_name_heads", lambda decoder, sequences: HEADS)
        return TextAndMatchingLoss(model, single_image_prompt(prompt_tokenizer()), discriminants, [])
