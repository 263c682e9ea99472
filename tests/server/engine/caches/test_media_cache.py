"""Media slots and caches: references, least recently used first, pins within their quota, sizes within their limits."""

from __future__ import annotations

import numpy as np
import torch

from server.engine.caches.media import MediaCache, MediaSlots, content_key

A, B, C, D, E = (letter * 32 for letter in (b"a", b"b", b"c", b"d", b"e"))


def test_the_longest_idle_media_item_is_evicted() -> None:
    slots = MediaSlots(2)
    slots.assign(A)
    slots.assign(B)
    slots.release(A)
    slots.release(B)
    slots.acquire(A)
    slots.release(A)  # B is now the longest idle
    slots.assign(C)
    assert (slots.find(A) is None, slots.find(B) is None) == (False, True)
    assert slots.num_evictions == 1


def test_media_in_use_are_never_evicted() -> None:
    slots = MediaSlots(2)
    slots.assign(A)
    slots.assign(B)
    slots.release(B)
    assert slots.num_available == 1
    assert slots.assign(C) != slots.find(A)


def test_a_media_item_is_in_use_until_its_last_reader_lets_it_go() -> None:
    slots = MediaSlots(1)
    slot = slots.assign(A)
    assert slots.acquire(A) == slot
    slots.release(A)
    assert (slots.num_available, slots.num_in_use) == (0, 1)
    slots.release(A)
    assert (slots.num_available, slots.num_in_use) == (1, 0)
    assert slots.acquire(A) == slot
    assert slots.num_available == 0


def test_pins_hold_and_take_at_most_a_quarter_of_the_slots() -> None:
    slots = MediaSlots(4)
    for key in (A, B, C, D):
        slots.assign(key)
        slots.release(key)
    slots.pin(E)  # it has no slot
    assert slots.num_pinned == 0
    slots.pin(A)
    slots.pin(A)
    slots.pin(B)  # two of four slots are more than a quarter
    assert slots.num_pinned == 1
    for key in (b"1" * 32, b"2" * 32, b"3" * 32):
        slots.assign(key)
        slots.release(key)
    assert slots.find(A) is not None
    slots.unpin(A)
    slots.unpin(A)
    assert slots.num_available == 4
    assert slots.num_pinned == 0


def test_a_key_is_of_pixels_shape_and_salt() -> None:
    frames = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(1, 2, 2, 3)
    key = content_key(frames, b"weights")
    assert key == content_key(frames.copy(), b"weights")
    assert key != content_key(frames, b"other weights")
    assert key != content_key(frames.reshape(2, 1, 2, 3), b"weights")
    assert key != content_key(frames + 1, b"weights")
    assert len(key) == 32


def test_a_source_is_requested_once_until_it_is_answered() -> None:
    media = MediaCache(2, 1000, b"")
    assert media.request([A, B, A]) == [A, B]
    assert media.request([A, C]) == [C]
    media.supply(A, np.zeros((1, 2, 2, 3), np.uint8))
    media.fail(B)
    assert media.request([A, B, C]) == [A, B]


def test_two_sources_of_one_image_have_one_key() -> None:
    media = MediaCache(2, 1000, b"")
    frames = np.zeros((1, 2, 2, 3), np.uint8)
    media.supply(A, frames)
    media.supply(B, frames.copy())
    assert media.content_keys.get(A) == media.content_keys.get(B)
    assert media.content_keys.get(C) is None


def test_discarding_media_frees_slots_at_once_or_with_the_last_reference() -> None:
    media = MediaCache(num_slots=4, host_bytes=1 << 20, salt=b"")
    for key in (A, B, C):
        media.slots.assign(key)
        media.host.put(key, torch.zeros(10))
    media.slots.release(A)
    media.slots.release(B)
    media.slots.pin(B)
    media.discard([A, B, C, D])
    assert [media.slots.find(key) is None for key in (A, B, C)] == [True, True, False]
    assert (media.slots.num_free, media.slots.num_pinned, media.host.size) == (3, 0, 0)
    media.slots.release(C)
    assert (media.slots.num_free, media.slots.find(C)) == (4, None)


def pool(media: MediaCache, image: int) -> bytes:
    """Take the frame of an image for its features, and return its key."""
    frames = np.full((1, 2, 2, 3), image, np.uint8)
    media.supply(bytes([image]) * 32, frames, for_page=False, for_pooling=True)
    key = media.content_keys.get(bytes([image]) * 32)
    assert key is not None
    piece = media.encode_for_pooling(key, max_frames=1)
    assert piece is not None
    assert (piece.count, piece.is_last, piece.has_last_frame) == (1, False, True)
    assert media.has_incomplete
    return key


def complete(media: MediaCache) -> list[int | None]:
    """Complete the media that were encoded for their features, and return their slots."""
    pieces = media.complete()
    assert all(piece.count == 0 and piece.is_last for piece in pieces)
    assert not media.has_incomplete
    return [piece.encoding.slot for piece in pieces]


def test_pooling_takes_only_a_free_slot_if_host_memory_keeps_the_tokens() -> None:
    media = MediaCache(num_slots=1, host_bytes=1 << 20, salt=b"")
    first = pool(media, 1)
    assert complete(media) == [0]
    pool(media, 2)
    assert complete(media) == [None]
    assert media.slots.find(first) == 0
    assert (media.slots.num_evictions, media.slots.num_in_use) == (0, 0)


def test_pooling_without_host_memory_takes_the_longest_idle_slot() -> None:
    media = MediaCache(num_slots=1, host_bytes=0, salt=b"")
    first, second = pool(media, 1), pool(media, 2)
    assert complete(media) == [0]  # media of one step do not evict each other
    assert (media.slots.find(first), media.slots.find(second)) == (0, None)
    media.slots.acquire(first)
    pool(media, 2)
    assert complete(media) == []  # the only slot is held
    media.slots.release(first)
    third = pool(media, 3)
    assert complete(media) == [0]
    assert (media.slots.find(first), media.slots.find(third)) == (None, 0)


def test_a_prompt_completes_media_that_were_encoded_for_their_features() -> None:
    media = MediaCache(num_slots=1, host_bytes=0, salt=b"")
    key = pool(media, 1)
    assert media.is_ready(key)
    assert media.num_cached([key]) == 1
    piece = media.encode(key, max_frames=0)
    assert piece is not None
    assert (piece.count, piece.is_last, piece.encoding.slot) == (0, True, 0)
    assert complete(media) == []


def test_media_that_await_completion_outlive_their_request_but_not_a_fault() -> None:
    media = MediaCache(num_slots=1, host_bytes=0, salt=b"")
    key = pool(media, 1)
    media.forget_frames(set())
    assert media.has_incomplete
    media.discard([key])
    assert complete(media) == []


def test_features_of_media_that_have_a_page_need_no_completion() -> None:
    media = MediaCache(num_slots=1, host_bytes=0, salt=b"")
    pool(media, 1)
    assert complete(media) == [0]
    pool(media, 1)
    assert complete(media) == []


def test_frames_for_pooling_are_kept_when_a_page_comes_from_the_host() -> None:
    media = MediaCache(num_slots=2, host_bytes=1 << 20, salt=b"")
    frames = np.zeros((1, 2, 2, 3), np.uint8)
    key = content_key(frames, b"")
    media.host.put(key, torch.zeros(4))
    media.supply(A, frames, for_page=True)
    assert not media.has_frames(key)
    media.supply(A, frames, for_page=True, for_pooling=True)
    piece = media.encode(key, max_frames=0)
    assert piece is not None
    assert piece.encoding.visual_tokens is not None
    assert piece.frames is None
    assert media.has_frames(key)


def supplied(media: MediaCache, name: bytes, num_frames: int) -> bytes:
    media.supply(name, np.full((num_frames, 2, 2, 3), name[0], np.uint8))
    key = media.content_keys.get(name)
    assert key is not None
    return key


def test_a_video_is_encoded_in_pieces_and_has_a_slot_with_the_last() -> None:
    media = MediaCache(num_slots=2, host_bytes=0, salt=b"")
    key = supplied(media, A, 5)
    for begin in (0, 2, 4):
        assert media.slots.find(key) is None
        assert media.is_encodable(key)
        assert media.encode(key, max_frames=0) is None
        media.supply(A, np.full((5, 2, 2, 3), A[0], np.uint8))  # again: it continues
        piece = media.encode(key, max_frames=2)
        assert piece is not None
        assert (piece.start, piece.is_last) == (begin, begin == 4)
        assert media.slots.find(key) == piece.encoding.slot
    assert media.slots.find(key) is not None
    assert not media.has_frames(key)


def test_features_are_kept_of_a_few_frames_and_the_first_video_goes_on() -> None:
    media = MediaCache(num_slots=8, host_bytes=0, salt=b"", max_kept_frames=4)
    first, second, third, image = (supplied(media, name, n) for name, n in ((A, 6), (B, 6), (C, 3), (D, 1)))
    assert media.encode(second, max_frames=2) is not None
    assert media.encode(first, max_frames=2) is not None
    # the features of four frames are kept
    assert media.encode(second, max_frames=1) is None
    assert media.encode(third, max_frames=1) is None
    assert media.encode(third, max_frames=1, is_last_resort=True) is not None
    assert media.encode(third, max_frames=2) is not None  # complete
    assert media.encode(image, max_frames=1) is not None
    assert media.encode(first, max_frames=2) is not None
    assert media.encode(first, max_frames=2) is not None
    assert media.encode(second, max_frames=2) is not None


def test_one_video_is_encoded_even_if_no_features_may_be_kept() -> None:
    media = MediaCache(num_slots=2, host_bytes=0, salt=b"", max_kept_frames=0)
    first, second = supplied(media, A, 4), supplied(media, B, 4)
    assert media.encode(first, max_frames=2) is not None
    assert media.encode(second, max_frames=2) is None
    assert media.encode(first, max_frames=2) is not None
    assert media.encode(second, max_frames=2) is not None


def test_features_of_media_that_no_request_needs_are_dropped() -> None:
    media = MediaCache(num_slots=2, host_bytes=0, salt=b"", max_kept_frames=2)
    first, second = supplied(media, A, 6), supplied(media, B, 6)
    assert media.encode(first, max_frames=2) is not None
    assert media.encode(second, max_frames=2) is None
    media.forget_frames({second})
    assert not media.is_encodable(first)
    piece = media.encode(second, max_frames=2)
    assert piece is not None
    assert piece.start == 0
