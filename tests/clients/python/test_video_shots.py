"""Shots with videos, and a video that is passed as an image."""

from __future__ import annotations

import pytest

from flamboyance_client import image, shot, text, video

MP4 = b"\0\0\0\x18ftypisom" + bytes(16)


def test_a_shot_may_show_a_video() -> None:
    assert shot(video(MP4), "a cat", end=False) == [video(MP4), text("a cat")]


def test_a_video_is_no_image() -> None:
    with pytest.raises(ValueError, match=r"this is a video: pass it to video\(\.\.\.\)"):
        image(MP4)
