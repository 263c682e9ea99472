"""Tests of packing: order and limits, one page per media item, and a loss that does not depend on the packing."""

from __future__ import annotations

import pytest
import torch

from model.prompt import EndOfChunk, Media, Text
from model.reference import encode, log_probs
from tests.tiny_models import CONFIGS, Family, prompt_tokenizer, tiny_model
from tests.training.test_examples import tokens
from training.batch import collate, pack
from training.bridge import BridgeLoss

FIRST = tokens(Media(b"1"), Text("red"), EndOfChunk(), Media(b"2"), Text("blue"), EndOfChunk())
SECOND = tokens(Text("now "), Media(b"2"), Text("blue"), EndOfChunk())
CPU = torch.device("cpu")


def pixels(seed: int) -> torch.Tensor:
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


MEDIA = {b"1": pixels(1), b"2": pixels(2)}


def test_packs_keep_the_order_and_the_token_limit() -> None:
    packs = pack([FIRST, SECOND, FIRST, FIRST], len(FIRST.token_ids) + len(SECOND.token_ids))
    assert packs == [[FIRST, SECOND], [FIRST], [FIRST]]


def test_a_media_item_of_two_sequences_is_one_page() -> None:
    batch = collate([FIRST, SECOND], MEDIA, CPU)
    assert len(batch.media) == 2
    ids = batch.batch.token_ids.tolist()
    assert batch.batch.media_slot is not None
    slots = batch.batch.media_slot.tolist()
    image = prompt_tokenizer().media_token_id
    assert [slot for token, slot in zip(ids, slots, strict=True) if token == image] == [0, 1, 1]


@pytest.mark.parametrize("family", ["openflamingo", "flamingo"])
def test_packing_does_not_change_the_loss(family: Family) -> None:
    loss = BridgeLoss(tiny_model(CONFIGS[family]))
    packed = loss(collate([FIRST, SECOND], MEDIA, CPU))
    separate = sum(loss(collate([sequence], MEDIA, CPU)) for sequence in (FIRST, SECOND))
    torch.testing.assert_close(packed, separate)


def test_the_loss_is_the_targets_negative_log_probability() -> None:
    """Each target is predicted from the tokens before it."""
    model = tiny_model(CONFIGS["flamingo"])
    logs = log_probs(model, SECOND.token_ids, SECOND.media_index, encode(model, [MEDIA[b"2"]]))
    positions = [position for position, is_target in enumerate(SECOND.target) if is_target]
    expected = -sum(logs[position - 1, SECOND.token_ids[position]] for position in positions)
    torch.testing.assert_close(BridgeLoss(model)(collate([SECOND], MEDIA, CPU)), torch.as_tensor(expected))


def test_media_of_different_lengths_keep_their_order() -> None:
    loss = BridgeLoss(tiny_model(CONFIGS["flamingo"]))
    video = torch.randn(3, 3, 8, 8)
    mixed = loss.visual_tokens((video, MEDIA[b"1"], video + 1, MEDIA[b"2"]))
    separate = torch.cat([loss.visual_tokens((media,)) for media in (video, MEDIA[b"1"], video + 1, MEDIA[b"2"])])
    torch.testing.assert_close(mixed, separate)


def test_cached_features_give_the_same_tokens_as_pixels() -> None:
    loss = BridgeLoss(tiny_model(CONFIGS["flamingo"]))
    features = loss.flamingo.vision(MEDIA[b"1"])[None]  # [F, P, Dv], one frame
    torch.testing.assert_close(loss.visual_tokens((features[0],)), loss.visual_tokens((MEDIA[b"1"],)))
