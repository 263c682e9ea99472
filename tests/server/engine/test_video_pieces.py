"""A video is encoded in pieces over several steps, with the result of one piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.batch import MediaPages
from model.inference import prepare_for_inference
from model.vision import normalise
from server.engine.caches.media import Encoding, MediaCache
from server.engine.device.encoder import Encoder, pool
from server.wire import Abort
from tests.engine_client import CONFIG, GREEDY, Prompt, assert_all_released, assert_equals_reference, client, frames
from tests.tiny_models import CONFIGS, FAMILIES, KIN_CONFIG, Family, tiny_model


@pytest.mark.parametrize("completes", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_pages_of_media_in_pieces_equal_those_of_the_model(family: Family, completes: bool) -> None:
    """Media of five, one and five frames are in steps of at most three frames, some of them together.

    Those that their last frames do not complete are completed by a step of their own.
    """
    untouched, model = tiny_model(CONFIGS[family]), tiny_model(CONFIGS[family])
    pages = MediaPages.zeros(model.config, 3, torch.float32, "cpu")
    media = MediaCache(3, 1 << 20, b"")
    encoder = Encoder(prepare_for_inference(model), pages, media)
    clips = [frames(0, 5), frames(1), frames(2, 5)]
    first, image, last = (Encoding(bytes([n]), clip, slot=n) for n, clip in enumerate(clips))
    for counts in ({first: [2]}, {first: [1, 1], last: [1]}, {last: [2], image: [1]}, {last: [2], first: [1]}):
        pieces = [e.next_piece(count, completes=completes) for e, of in counts.items() for count in of]
        encoder.encode(pieces)
    assert all(bytes([n]) in media.pooled for n in range(3))
    if not completes:
        assert not media.host.size
        encoder.encode([encoding.next_piece(0) for encoding in (last, image, first)])
    for n, clip in enumerate(clips):
        features = untouched.features(normalise(torch.from_numpy(clip), model.config.vision)[None])
        page = untouched.media_kv(untouched.resampler(features))[0]
        torch.testing.assert_close(pages.pages[n], page, atol=1e-5, rtol=1e-5)
        pooled = media.pooled.get(bytes([n]))
        assert pooled is not None
        torch.testing.assert_close(torch.from_numpy(pooled), pool(features)[0], atol=1e-5, rtol=1e-5)


def test_pooled_features_are_without_kin() -> None:
    untouched, model = tiny_model(KIN_CONFIG), tiny_model(KIN_CONFIG)
    pages, media = MediaPages.zeros(model.config, 1, torch.float32, "cpu"), MediaCache(1, 1 << 20, b"")
    clip = frames(0, 3)
    encoding = Encoding(b"clip", clip, slot=0)
    encoder = Encoder(prepare_for_inference(model), pages, media)
    encoder.encode([encoding.next_piece(2)])
    encoder.encode([encoding.next_piece(1)])
    pixels = normalise(torch.from_numpy(clip), model.config.vision)
    page = untouched.media_kv(untouched.encode_media(pixels[None]))[0]
    torch.testing.assert_close(pages.pages[0], page, atol=1e-5, rtol=1e-5)
    pooled = media.pooled.get(b"clip")
    assert pooled is not None
    expected = untouched.vision.plain_features(pixels).mean((0, 1))
    torch.testing.assert_close(torch.from_numpy(pooled), expected, atol=1e-5, rtol=1e-5)


def test_kept_features_take_no_more_memory_than_their_frames() -> None:
    model = tiny_model(CONFIGS["flamingo"])
    pages = MediaPages.zeros(model.config, 2, torch.float32, "cpu")
    encoder = Encoder(prepare_for_inference(model), pages, MediaCache(2, 1 << 20, b""))
    clip, long = Encoding(b"clip", frames(0, 2)), Encoding(b"long", frames(1, 16))
    encoder.encode([clip.next_piece(1), long.next_piece(15)])
    vision = model.config.vision
    size = vision.num_patches * vision.feature_dim * 4
    assert [f.untyped_storage().nbytes() for e in (clip, long) for f in e.features] == [size, 15 * size]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_video_is_encoded_in_pieces_next_to_other_requests(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step has more frames than its budget; an aborted request leaves nothing."""
    answer, counts = client(family), list[int]()
    features = answer.engine.runner.encoder.features

    def watched(clips: Sequence[NDArray[np.uint8]]) -> Tensor:
        counts.append(sum(map(len, clips)))
        return features(clips)

    monkeypatch.setattr(answer.engine.runner.encoder, "features", watched)
    other, video = Prompt(((-1, 9),), max_tokens=30), Prompt(((0, 3), (5, 4)))
    answer.engine.add(other.request("other", msgspec.structs.replace(GREEDY, max_tokens=30)))
    for _ in range(3):
        answer.step()
    answer.engine.add(video.request("aborted"))
    for _ in range(4):
        answer.step()
    assert 0 < sum(counts) < 1 + len(frames(5))
    answer.engine.abort(Abort("aborted"))
    assert not answer.engine.media._encodings
    counts.clear()
    answer.engine.add(video.request("video"))
    answer.run()
    assert max(counts) <= CONFIG.max_frames_per_step
    assert sum(counts) == len(frames(5))
    assert_equals_reference(family, video, answer, "video")
    assert_equals_reference(family, other, answer, "other", 30)
    assert_all_released(answer.engine)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_goes_on_after_its_video_was_encoded_again_in_pieces(family: Family) -> None:
    """Its keys and values are still cached, so that it comes back without a prompt to compute, and without a page."""
    answer = client(
        family, replace(CONFIG, block_size=1, num_blocks=128, max_sequences=1, num_media_slots=2, host_media_bytes=0)
    )
    video, images = Prompt(((5, 1),)), Prompt(((0, 1), (1, 1)))
    answer.engine.add(video.request("video"))
    while not answer.ids("video"):
        answer.step()
    answer.engine.add(images.request("images"))
    answer.run()
    assert answer.engine.residents.num_preemptions == 1
    assert_equals_reference(family, video, answer, "video")
    assert_equals_reference(family, images, answer, "images")
