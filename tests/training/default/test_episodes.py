"""Tests of the default model's sequences: determined by their number, free of held-out data, targets only when taught."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch

from model.prompt import PromptTokenizer
from tests.tiny_models import CONFIGS, PROMPT, byte_tokenizer, prompt_tokenizer, tiny_model
from training.batch import collate
from training.default import episodes as episodes_module
from training.default.alignment import AlignmentLoss, AlignmentPairs, encode_labels
from training.default.catalogue import Catalogue, row_of
from training.default.discriminants import Discriminants, Domains
from training.default.episodes import LIMITS, MAKERS, Episodes, Item, Maker, build_example, novel_words
from training.default.states import single_image_prompt
from training.default.words import HELD_OUT_WORDS, TRAINED_WORDS, common_words
from training.default_data.split import is_held_out, is_held_out_image
from training.mixture import merge_media


@pytest.fixture(scope="module")
def episodes(catalogue: Catalogue) -> Episodes:
    return Episodes(catalogue, prompt_tokenizer(), seed=0, per_pool=8)


@pytest.fixture(scope="module")
def domains(discriminants: Discriminants) -> Domains:
    return Domains(discriminants, lambda features: features)


def items(episodes: Episodes, make: Maker, seed: int) -> list[Item]:
    return make(episodes, episodes.pool(Random(seed)), Random(seed))


def test_training_rows_exclude_held_out_data(catalogue: Catalogue) -> None:
    for rows in (*catalogue.labels.values(), *catalogue.categories.values()):
        for record in (catalogue.records[row] for row in rows):
            assert record.trains
            assert not is_held_out(record.label)
            assert not is_held_out(record.category)
            assert not is_held_out_image(record.image)
    assert all(is_held_out(label) for label in catalogue.held_out_labels)
    assert set(catalogue.photographs) == {
        f"photo {kind}" for kind in ("animal", "fruit", "tool", "vehicle", "plant", "cloth")
    }


def test_unseen_images_have_known_labels(catalogue: Catalogue) -> None:
    training_rows = {row for rows in catalogue.labels.values() for row in rows}
    unseen_rows = {row for rows in catalogue.unseen_images.values() for row in rows}
    assert unseen_rows
    assert not unseen_rows & training_rows
    assert catalogue.unseen_images.keys() <= catalogue.labels.keys()


@pytest.mark.parametrize("make", [maker for maker, _ in MAKERS], ids=lambda maker: maker.__name__)
@pytest.mark.parametrize("seed", range(6))
def test_every_kind_of_sequence_has_targets_and_training_rows(
    episodes: Episodes, catalogue: Catalogue, make: Maker, seed: int
) -> None:
    sequence = items(episodes, make, seed)
    assert 0 < len(sequence) <= LIMITS.max_media
    assert any(item.is_learned for item in sequence)
    allowed = {row for rows in (*catalogue.labels.values(), *catalogue.categories.values()) for row in rows}
    assert {item.row for item in sequence} <= allowed


@pytest.mark.parametrize("seed", range(20))
def test_a_novel_word_is_a_target_from_its_second_image_on(episodes: Episodes, seed: int) -> None:
    labels_by_word: dict[str, set[str]] = {}
    for item in items(episodes, novel_words, seed):
        label = episodes.catalogue.records[item.row].label
        assert item.answer in TRAINED_WORDS
        assert item.is_learned == (item.answer in labels_by_word)
        labels_by_word.setdefault(item.answer, set()).add(label)
    assert all(len(labels) == 1 for labels in labels_by_word.values())


def test_a_sequence_is_determined_by_its_number_and_a_step_shares_images(episodes: Episodes) -> None:
    first = [episodes(number) for number in range(8)]
    assert [example.tokens for example in first] == [episodes(number).tokens for number in range(8)]
    rows = {row_of(media) for example in first for media in example.media}
    assert len(rows) <= 10 * 4 + 4 * 3


@pytest.fixture
def long_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise the limit of tokens, because the tests' tokenizer writes a word in many tokens."""
    monkeypatch.setattr(episodes_module, "LIMITS", replace(LIMITS, max_tokens=2048))


@pytest.mark.usefixtures("long_sequences")
def test_all_images_of_a_step_are_rotated_alike_and_each_step_differently(
    catalogue: Catalogue, discriminants: Discriminants, domains: Domains, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(episodes_module, "random_view", lambda features, rng: features)
    turned = Episodes(catalogue, prompt_tokenizer(), 0, 4, domains)
    rotations = []
    for step in range(2):
        media = merge_media(turned(number) for number in range(4 * step, 4 * step + 4))
        before = discriminants(torch.cat([catalogue.features(row_of(key)) for key in media]).float().flatten(0, 1))
        after = discriminants(torch.cat(list(media.values())).flatten(0, 1))
        rotation = torch.linalg.lstsq(before, after).solution
        torch.testing.assert_close(before @ rotation, after, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(8), atol=1e-3, rtol=0)
        rotations.append(rotation)
    assert (rotations[0] - rotations[1]).norm() > 1


@pytest.mark.usefixtures("long_sequences")
@pytest.mark.parametrize("number", range(12))
def test_turned_sequences_teach_only_novel_words(catalogue: Catalogue, domains: Domains, number: int) -> None:
    tokenizer = prompt_tokenizer()
    tokens = Episodes(catalogue, tokenizer, 0, 4, domains)(number).tokens
    targets = tokenizer.decode([t for t, is_target in zip(tokens.token_ids, tokens.target, strict=True) if is_target])
    assert any(word in targets for word in TRAINED_WORDS)
    assert not any(label in targets for label in catalogue.labels)


def test_only_answers_and_their_ends_are_targets(episodes: Episodes) -> None:
    sequence = items(episodes, novel_words, 3)
    example = build_example("it", sequence)
    assert example.answers is not None
    assert len(example.answers) == 2 * sum(item.is_learned for item in sequence)


def test_alignment_pairs_two_images_of_a_label(catalogue: Catalogue) -> None:
    pairs = AlignmentPairs(catalogue, prompt_tokenizer(), seed=0)
    for number in range(0, 10, 2):
        first, second = pairs(number), pairs(number + 1)
        assert first.tokens.token_ids == second.tokens.token_ids
        assert first.tokens.media != second.tokens.media
        label = pairs.labels[first.tokens.token_ids[-1]]
        assert {catalogue.records[row_of(m)].label for p in (first, second) for m in p.tokens.media} == {label}


def test_a_few_steps_of_descent_lower_the_alignment_loss(catalogue: Catalogue, discriminants: Discriminants) -> None:
    tokenizer = prompt_tokenizer()
    model = tiny_model(CONFIGS["flamingo"]).requires_grad_(False)
    for part in (model.resampler, model.gated):
        part.requires_grad_(True)
    pairs = AlignmentPairs(catalogue, tokenizer, seed=0)
    loss = AlignmentLoss(model, encode_labels(pairs.labels, tokenizer), single_image_prompt(tokenizer), discriminants)
    examples = [pairs(number) for number in range(16)]
    batch = collate([example.tokens for example in examples], merge_media(examples), torch.device("cpu"))
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    values = []
    for _ in range(12):
        optimizer.zero_grad()
        value = loss(batch)
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert values[-1] < 0.8 * values[0]


def test_words_are_all_invented_or_all_common(catalogue: Catalogue) -> None:
    extended = byte_tokenizer()
    extended.add_tokens([" house", " green", " Paris", " it", " x9y", "tree", f" {HELD_OUT_WORDS[0]}"])
    tokenizer = PromptTokenizer(extended, byte_tokenizer(), PROMPT)
    assert common_words(tokenizer) == ("house", "green")
    episodes = Episodes(catalogue, tokenizer, seed=0, per_pool=8)
    word_lists = [episodes.words(2, Random(seed)) for seed in range(40)]
    assert all(set(words) == {"house", "green"} or set(words) <= set(TRAINED_WORDS) for words in word_lists)
    assert len({set(words) <= set(TRAINED_WORDS) for words in word_lists}) == 2
