"""Where names are looked up: the scores are those of the forward's own attention, and are held to the images' likeness."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.causal_attention import causal_attention
from model.batch import NO_CACHE, whole_sequences
from model.config import ConfigError
from model.flamingo import Flamingo
from model.language_model import Layer, StepContext
from tests.tiny_models import CONFIGS, prompt_tokenizer, tiny_model
from tests.training.default.data import make_folder
from training.batch import TrainingBatch, collate
from training.bridge import bridge_parameters, freeze
from training.default import episodes as episodes_module
from training.default import matching
from training.default.catalogue import Catalogue
from training.default.discriminants import Discriminants, discriminants
from training.default.episodes import LIMITS, Episodes
from training.default.matching import (
    TextAndMatchingLoss,
    by_word,
    mismatch,
    names_before,
    names_nearer_the_start,
    pages_of,
    probe,
    read,
)
from training.default.states import one_image
from training.examples import Tokens

HEADS = {1: torch.tensor([0, 3]), 2: torch.tensor([2])}


@pytest.fixture
def model() -> Flamingo:
    return tiny_model(CONFIGS["flamingo"])


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return Catalogue(make_folder(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def found(catalogue: Catalogue) -> Discriminants:
    things = [torch.stack([catalogue.pooled(row) for row in rows]) for rows in catalogue.labels.values()]
    return discriminants(things, torch.randn(20, things[0].shape[1], generator=torch.Generator().manual_seed(0)), 8)


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' tokenizer writes words in many tokens."""
    for module in (episodes_module, matching):
        monkeypatch.setattr(module, "LIMITS", replace(LIMITS, max_tokens=2048))


@pytest.fixture
def batch(catalogue: Catalogue, roomy: None) -> TrainingBatch:
    made = [Episodes(catalogue, prompt_tokenizer(), 0, 4)(number) for number in range(4)]
    media = {digest: shown for one in made for digest, shown in one.media.items()}
    return collate([one.tokens for one in made], media, torch.device("cpu"))


def test_a_name_begins_behind_its_prompt(batch: TrainingBatch) -> None:
    """Every image has one, unless it was asked about otherwise; what is learned of it begins with the first target."""
    assert batch.batch.media_slot is not None
    read_by = batch.batch.media_slot[batch.names].tolist()
    assert len(batch.names) <= int((batch.batch.token_ids == prompt_tokenizer().media_token_id).sum())
    assert min(read_by) >= 0
    targets = batch.batch.last_token + 1
    begun = targets[~torch.isin(targets - 1, targets)]
    assert torch.isin(batch.names, begun).any()
    assert not torch.isin(batch.names, targets[torch.isin(targets - 1, targets)]).any()


def test_the_forward_is_the_models_own(model: Flamingo, batch: TrainingBatch, found: Discriminants) -> None:
    loss = matching_loss(model, found)
    media = model.fresh_media(loss.visual_tokens(batch.media))
    x, _ = read(model, batch, media, HEADS)
    logits = model.language_model.logits(x[batch.batch.last_token])
    torch.testing.assert_close(logits, model(batch.batch, NO_CACHE, media))
    words = batch.batch.token_ids[batch.names]
    torch.testing.assert_close(
        model.language_model.logits_of(x, words), model.language_model.logits(x)[:, words], atol=1e-5, rtol=1e-4
    )


def test_what_is_said_of_a_word_is_shared_by_its_names() -> None:
    """By hand: three names before, two of them one word's; whoever says the words' wanted shares is not unlike."""
    words, seen = torch.tensor([7, 8, 7, 9]), torch.ones(4, 4, dtype=torch.bool).tril(-1)
    wanted = torch.tensor([0.2, 0.5, 0.3, 0.0]).log().expand(4, 4)
    said = torch.tensor([0.5, 0.5, 0.5, 0.0]).log().expand(4, 4)  # of the word, at each of its names
    assert float(mismatch(*by_word(said, wanted, seen, words), seen)) < 0.1  # row 2 saw 2 : 5 of the words
    last = torch.zeros(4, 4, dtype=torch.bool)
    last[3, :3] = True
    assert float(mismatch(*by_word(said, wanted, last, words), last)) < 1e-5
    biased = said + torch.tensor([2.0, 0.0, 2.0, 0.0])
    share = torch.tensor([0.5, 0.5])
    found = (torch.tensor([2.0, 0.0]) + share.log()).log_softmax(0)
    by_hand = float((share * (share.log() - found)).sum())
    assert float(mismatch(*by_word(biased, wanted, last, words), last)) == pytest.approx(by_hand, rel=1e-4)


def test_scores_are_those_of_the_attention(
    model: Flamingo, batch: TrainingBatch, found: Discriminants, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def spy(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *, scale: float, alibi_slopes: None) -> Tensor:
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        seen.append(torch.einsum("qhk,nhk->hqn", query, keys) * scale)
        return causal_attention(query, key, value, starts, scale=scale, alibi_slopes=alibi_slopes)

    monkeypatch.setattr("model.language_model.causal_attention", spy)
    media = model.fresh_media(matching_loss(model, found).visual_tokens(batch.media))
    _, scores = read(model, batch, media, HEADS)
    asked, names = batch.names - 1, batch.names
    wanted = [seen[layer][head][asked][:, names] for layer, heads in HEADS.items() for head in heads.tolist()]
    torch.testing.assert_close(scores, torch.stack(wanted), atol=1e-5, rtol=1e-4)


def test_only_names_before_in_the_same_sequence_are_seen(batch: TrainingBatch) -> None:
    before = names_before(batch)
    starts = batch.batch.query_starts.tolist()
    for asked, row in zip(batch.names.tolist(), before, strict=True):
        first = max(start for start in starts if start <= asked)
        assert row.tolist() == [first <= name < asked for name in batch.names.tolist()]


def test_across_sequences_other_images_are_compared_that_stand_nearer_the_start(batch: TrainingBatch) -> None:
    pages = pages_of(batch)
    assert batch.batch.media_slot is not None
    assert pages.tolist() == [int(batch.batch.media_slot[name]) for name in batch.names.tolist()]
    found = names_nearer_the_start(batch, pages)
    places = [int(batch.batch.positions[name]) for name in batch.names.tolist()]
    for asked, row in enumerate(found.tolist()):
        wanted = [places[n] < places[asked] and pages[n] != pages[asked] for n in range(len(places))]
        assert row == wanted
    assert int(found.sum()) > 2 * int(names_before(batch).sum())


def test_mismatch_is_nothing_where_all_look_as_wanted() -> None:
    wanted = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    seen = torch.ones(5, 5, dtype=torch.bool).tril(-1)
    assert float(mismatch((wanted + torch.arange(5.0)[:, None]).expand(3, 5, 5), wanted, seen).max()) < 1e-6
    ahead = torch.where(seen, wanted, 100.0)
    assert float(mismatch(ahead, wanted, seen)) < 1e-6  # what is not seen does not count
    even = torch.zeros(5, 5)
    target = [wanted[row, :row].softmax(0) for row in range(2, 5)]  # row 0 sees none, and row 1 has no choice
    by_hand = sum(float((t * (t * len(t)).log()).sum()) for t in target) / 3
    assert float(mismatch(even, wanted, seen)) == pytest.approx(by_hand, rel=1e-4)


class LooksAtNames:
    """A decoder of one layer, whose first head looks at the names before, its second at where it stands."""

    def __init__(self, names: tuple[int, ...]) -> None:
        self.names = names

    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, key = torch.zeros(len(x), 2, 64), torch.zeros(len(x), 2, 64)
        query[:, 0, 0] = key[list(self.names), 0, 0] = 40.0
        places = torch.arange(len(x))
        query[places, 1, places] = key[places, 1, places] = 40.0
        return query, key


def test_heads_are_found_by_how_much_they_look_at_names(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Tokens(token_ids=[0] * 40, media_index=[-1] * 40, target=[False] * 40, media=[], names=(3, 9, 20, 31))
    looks = LooksAtNames(one.names)
    monkeypatch.setattr(matching, "query_and_key", lambda layer, x, step, rows: looks.queries_and_keys(x[rows]))
    layer, x = tiny_model(CONFIGS["flamingo"]).language_model.layers[0], torch.zeros(80, 32)
    assert isinstance(layer, Layer)
    share = matching._looks_at_names(layer, x, StepContext(whole_sequences([[0]], [[-1]])), [0, 40, 80], [one, one])
    assert share[0] > 0.99
    assert share[1] < 0.01


def test_the_probe_asks_for_names_that_stood_there_before(roomy: None) -> None:
    tokenizer = prompt_tokenizer()
    sequences = probe(tokenizer)
    assert len(sequences) == matching.COUNT
    for one in sequences:
        begun = [one.token_ids[name : name + 3] for name in one.names]
        assert len(begun) == 2 * matching.NUM_WORDS
        assert all(name in begun[: matching.NUM_WORDS] for name in begun[matching.NUM_WORDS :])


def test_a_model_without_any_is_refused(model: Flamingo, found: Discriminants, roomy: None) -> None:
    tokenizer = prompt_tokenizer()
    with pytest.raises(ConfigError, match="looks at the names before"):
        TextAndMatchingLoss(model, one_image(tokenizer), found, probe(tokenizer))


def test_descent_makes_the_heads_look_at_what_is_alike(
    model: Flamingo, batch: TrainingBatch, found: Discriminants
) -> None:
    loss = matching_loss(model, found)
    freeze(model, torch.float32)
    optimizer = torch.optim.Adam([p for _, p in bridge_parameters(model)], lr=3e-3)

    def apart() -> Tensor:
        _, scores = read(model, batch, model.fresh_media(loss.visual_tokens(batch.media)), HEADS)
        return mismatch(scores, loss._wanted(batch, pages_of(batch)), names_before(batch)).mean()

    first = float(apart().detach())
    for _ in range(40):
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
    assert float(apart().detach()) < 0.6 * first


def matching_loss(model: Flamingo, found: Discriminants) -> TextAndMatchingLoss:
    """Of a tiny model, whose heads are given: random ones look behind nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "name_heads", lambda decoder, sequences: HEADS)
        return TextAndMatchingLoss(model, one_image(prompt_tokenizer()), found, [])
