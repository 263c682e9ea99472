"""Sequences of the second stage: the same by number, nothing held out in them, a word learned only once it was taught."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch

from model.tokenizer import PromptTokenizer
from tests.tiny_models import CONFIGS, PROMPT, byte_tokenizer, prompt_tokenizer, tiny_model
from tests.training.default.data import make_folder
from training.batch import collate
from training.default import episodes as episodes_module
from training.default.alignment import AlignmentLoss, Alignments, label_ids
from training.default.catalogue import Catalogue, row_of
from training.default.discriminants import Discriminants, discriminants
from training.default.episodes import LIMITS, MAKERS, Episodes, Item, Maker, as_example, novel_words
from training.default.states import one_image
from training.default.words import HELD_OUT_WORDS, TRAINED_WORDS, common_words
from training.default_data.split import held_out, held_out_image


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return Catalogue(make_folder(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def episodes(catalogue: Catalogue) -> Episodes:
    return Episodes(catalogue, prompt_tokenizer(), seed=0, per_pool=8)


def items(episodes: Episodes, make: Maker, seed: int) -> list[Item]:
    return make(episodes, episodes.pool(Random(seed)), Random(seed))


def test_nothing_held_out_is_trained_on(catalogue: Catalogue) -> None:
    for rows in (*catalogue.labels.values(), *catalogue.categories.values()):
        for record in (catalogue.records[row] for row in rows):
            assert record.trains
            assert not held_out(record.label)
            assert not held_out(record.category)
            assert not held_out_image(record.image)
    assert all(held_out(label) for label in catalogue.held_out_labels)
    assert set(catalogue.photographs) == {
        f"photo {kind}" for kind in ("animal", "fruit", "tool", "vehicle", "plant", "cloth")
    }


def test_unseen_images_are_of_known_labels(catalogue: Catalogue) -> None:
    trained = {row for rows in catalogue.labels.values() for row in rows}
    unseen = {row for rows in catalogue.unseen_images.values() for row in rows}
    assert unseen
    assert not unseen & trained
    assert catalogue.unseen_images.keys() <= catalogue.labels.keys()


@pytest.mark.parametrize("make", [maker for maker, _ in MAKERS], ids=lambda maker: maker.__name__)
@pytest.mark.parametrize("seed", range(6))
def test_every_kind_of_sequence(episodes: Episodes, catalogue: Catalogue, make: Maker, seed: int) -> None:
    made = items(episodes, make, seed)
    assert 0 < len(made) <= LIMITS.max_media
    assert any(one.is_learned for one in made)
    allowed = {row for rows in (*catalogue.labels.values(), *catalogue.categories.values()) for row in rows}
    assert {one.row for one in made} <= allowed


@pytest.mark.parametrize("seed", range(20))
def test_a_novel_word_is_learned_from_its_second_image_on(episodes: Episodes, seed: int) -> None:
    seen: dict[str, set[str]] = {}
    for one in items(episodes, novel_words, seed):
        label = episodes.catalogue.records[one.row].label
        assert one.answer in TRAINED_WORDS
        assert one.is_learned == (one.answer in seen)
        seen.setdefault(one.answer, set()).add(label)
    assert all(len(labels) == 1 for labels in seen.values())


def test_a_number_is_a_sequence_and_neighbours_share_images(episodes: Episodes) -> None:
    first = [episodes(number) for number in range(8)]
    assert [one.tokens for one in first] == [episodes(number).tokens for number in range(8)]
    rows = {row_of(media) for one in first for media in one.media}
    assert len(rows) <= 10 * 4 + 4 * 3


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' tokenizer writes words in many tokens."""
    monkeypatch.setattr(episodes_module, "LIMITS", replace(LIMITS, max_tokens=2048))


@pytest.fixture(scope="module")
def found(catalogue: Catalogue) -> Discriminants:
    things = [torch.stack([catalogue.pooled(row) for row in rows]) for rows in catalogue.labels.values()]
    return discriminants(things, torch.randn(20, things[0].shape[1], generator=torch.Generator().manual_seed(0)), 8)


@pytest.mark.usefixtures("roomy")
def test_discriminants_turn_together_in_a_step_and_anew_in_the_next(
    catalogue: Catalogue, found: Discriminants, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(episodes_module, "view", lambda features, rng: features)
    turned = Episodes(catalogue, prompt_tokenizer(), 0, 4, found)
    rotations = []
    for step in range(2):
        shown = {m: f for number in range(4 * step, 4 * step + 4) for m, f in turned(number).media.items()}
        before = found(torch.cat([catalogue.features(row_of(media)) for media in shown]).float().flatten(0, 1))
        after = found(torch.cat(list(shown.values())).flatten(0, 1))
        rotation = torch.linalg.lstsq(before, after).solution
        torch.testing.assert_close(before @ rotation, after, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(8), atol=1e-3, rtol=0)
        rotations.append(rotation)
    assert (rotations[0] - rotations[1]).norm() > 1


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("number", range(12))
def test_turned_sequences_teach_novel_words_alone(catalogue: Catalogue, found: Discriminants, number: int) -> None:
    tokenizer = prompt_tokenizer()
    tokens = Episodes(catalogue, tokenizer, 0, 4, found)(number).tokens
    said = tokenizer.decode([t for t, is_target in zip(tokens.token_ids, tokens.target, strict=True) if is_target])
    assert any(word in said for word in TRAINED_WORDS)
    assert not any(label in said for label in catalogue.labels)


def test_answers_and_their_ends_are_what_is_learned(episodes: Episodes) -> None:
    made = items(episodes, novel_words, 3)
    example = as_example("it", made)
    assert example.answers is not None
    assert len(example.answers) == 2 * sum(one.is_learned for one in made)


def test_alignment_pairs_two_images_of_a_label(catalogue: Catalogue) -> None:
    pairs = Alignments(catalogue, prompt_tokenizer(), seed=0)
    for number in range(0, 10, 2):
        one, other = pairs(number), pairs(number + 1)
        assert one.tokens.token_ids == other.tokens.token_ids
        assert one.tokens.media != other.tokens.media
        label = pairs.labels[one.tokens.token_ids[-1]]
        assert {catalogue.records[row_of(m)].label for p in (one, other) for m in p.tokens.media} == {label}


def test_alignment_is_lower_where_images_fit_their_labels(catalogue: Catalogue, found: Discriminants) -> None:
    """A few steps of descent on one batch: the loss can be learned at all, through the gates."""
    tokenizer = prompt_tokenizer()
    model = tiny_model(CONFIGS["flamingo"]).requires_grad_(False)
    for part in (model.resampler, model.gated):
        part.requires_grad_(True)
    pairs = Alignments(catalogue, tokenizer, seed=0)
    loss = AlignmentLoss(model, label_ids(pairs.labels, tokenizer), one_image(tokenizer), found)
    prepared = [pairs(number) for number in range(16)]
    media = {digest: shown for one in prepared for digest, shown in one.media.items()}
    batch = collate([one.tokens for one in prepared], media, torch.device("cpu"))
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    values = []
    for _ in range(12):
        optimizer.zero_grad()
        value = loss(batch)
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert values[-1] < 0.8 * values[0]


def test_words_are_all_made_up_or_all_common(catalogue: Catalogue) -> None:
    marked = byte_tokenizer()
    marked.add_tokens([" house", " green", " Paris", " it", " x9y", "tree", f" {HELD_OUT_WORDS[0]}"])
    tokenizer = PromptTokenizer(marked, byte_tokenizer(), PROMPT)
    assert common_words(tokenizer) == ("house", "green")
    episodes = Episodes(catalogue, tokenizer, seed=0, per_pool=8)
    drawn = [episodes.words(2, Random(seed)) for seed in range(40)]
    assert all(set(words) == {"house", "green"} or set(words) <= set(TRAINED_WORDS) for words in drawn)
    assert len({set(words) <= set(TRAINED_WORDS) for words in drawn}) == 2
