"""Video files that lack data are refused, in every form of their container; titles and other metadata are not read."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from model.media import MediaError, MediaLimits, load_video
from model.truncation import video_ends_early

FORMS = {
    "mp4": ("mp4", "mpeg4", {}),
    "index first": ("mp4", "mpeg4", {"movflags": "faststart"}),
    "fragments": ("mp4", "mpeg4", {"movflags": "frag_keyframe+empty_moov"}),
    "webm": ("webm", "libvpx", {}),
    "matroska": ("matroska", "mpeg4", {}),
}


def noise(folder: Path, form: str, codec: str, options: dict[str, str], *, title: str = "none") -> bytes:
    """Return a video of noise, four seconds long."""
    file = folder / "video"  # a path, since an index is moved to the front by reading the file again
    with av.open(str(file), mode="w", format=form, options=options) as container:
        container.metadata["title"] = title
        stream: Any = container.add_stream(codec, rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(16):
            pixels = np.random.default_rng(i).integers(0, 255, (48, 64, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_image(Image.fromarray(pixels))
            frame.pts, frame.time_base = i, Fraction(1, 4)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.read_bytes()


@pytest.mark.parametrize("name", FORMS)
def test_a_file_without_its_end_is_refused(name: str, tmp_path: Path) -> None:
    form, codec, options = FORMS[name]
    data = noise(tmp_path, form, codec, options)
    assert len(list(load_video(data, MediaLimits()))) == 4
    for length in (len(data) // 2, len(data) * 9 // 10, len(data) - 1):
        with pytest.raises(MediaError, match="its end is missing"):
            list(load_video(data[:length], MediaLimits()))


def test_a_file_of_unknown_length_is_decoded(tmp_path: Path) -> None:
    data = noise(tmp_path, "matroska", "mpeg4", {"live": "1"})
    assert len(list(load_video(data, MediaLimits()))) == 4
    assert not video_ends_early(data[:-100], "matroska")


def test_a_frame_that_lacks_data_is_refused(tmp_path: Path) -> None:
    data = noise(tmp_path, *FORMS["mp4"])
    start = data.index(b"mdat") + 100  # in the first frame, the rest of which FFmpeg would fill
    with pytest.raises(MediaError, match="video cannot be decoded: a frame lacks data"):
        list(load_video(data[:start] + bytes(100) + data[start + 100 :], MediaLimits()))


def test_a_title_may_have_any_encoding(tmp_path: Path) -> None:
    data = noise(tmp_path, *FORMS["mp4"], title="Cafeteria")
    assert b"Cafeteria" in data
    assert len(list(load_video(data.replace(b"Cafeteria", b"Caf\xe9teria"), MediaLimits()))) == 4


def test_an_unknown_codec_is_refused(tmp_path: Path) -> None:
    data = noise(tmp_path, *FORMS["webm"]).replace(b"V_VP8", b"V_NEW")
    with pytest.raises(MediaError, match="video has a codec that is not supported"):
        list(load_video(data, MediaLimits()))


def test_a_box_may_have_an_eight_byte_size_or_extend_to_the_end() -> None:
    head = (16).to_bytes(4, "big") + b"ftypisom" + bytes(4)
    long = (1).to_bytes(4, "big") + b"mdat" + (24).to_bytes(8, "big") + bytes(8)
    assert not video_ends_early(head + long, "mp4")
    assert video_ends_early(head + long[:-1], "mp4")
    assert not video_ends_early(head + bytes(4) + b"mdat" + bytes(3), "mp4")


@given(st.binary(max_size=64), st.sampled_from(["mp4", "matroska"]))
def test_any_bytes_are_accepted(data: bytes, form: str) -> None:
    assert video_ends_early(data, form) in (True, False)
