"""Clips of benchmarks: a segment of a video has its own frames, upright, and is cut only if no file has it alone."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import pytest
from PIL import Image

from evaluation.benchmarks.clips import encode, media
from evaluation.benchmarks.items import DataError, Item, MediaNames, Row
from model.media import MediaLimits, load_video
from tests.evaluation.benchmarks import official_files as official
from tests.evaluation.benchmarks.test_readers import read, written
from tests.model import test_turned_videos as turned_videos
from tests.server.media.videos import film


def test_segments_are_cut_unless_a_file_has_the_segment_alone(tmp_path: Path) -> None:
    whole, cut = read("ivqa", written("ivqa", tmp_path)).items
    assert (whole.media.name, whole.segment) == ("test-whole.webm", (1.0, 3.0))
    assert (cut.media.name, cut.segment) == ("test-cut_0_2.mp4", None)
    assert media(cut) == cut.media
    assert seconds_of(media(whole)) == pytest.approx(2, abs=0.3)
    assert read("nextqa", written("nextqa", tmp_path / "n")).items[0].media.parent.name == "1164"


def seconds_of(video: Path | bytes) -> float:
    assert isinstance(video, bytes)
    return len(frames_of(video)) / 8


def frames_of(video: bytes) -> list[av.VideoFrame]:
    with av.open(io.BytesIO(video), "r") as container:
        return list(container.decode(video=0))


def test_a_segment_shows_its_own_frames(tmp_path: Path) -> None:
    """The second second of the video is blue."""
    official.write_video(tmp_path / "video.avi", seconds=3)
    video = encode(tmp_path / "video.avi", 1.0, 2.0)
    assert video is not None
    colours = [frame.to_ndarray(format="rgb24").mean((0, 1)) for frame in frames_of(video)]
    assert len(colours) in (7, 8)
    assert all(colour.argmax() == 2 for colour in colours)
    assert encode(tmp_path / "video.avi", 50.0, 60.0) is None


@pytest.mark.parametrize("turn", list(turned_videos.MATRICES))
def test_a_segment_of_a_turned_video_is_upright(turn: str, tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_bytes(turned_videos.video(turn))
    (expected,) = load_video(turned_videos.video(turn), MediaLimits())
    video = encode(tmp_path / "video.mp4", 0.0, 5.0)
    assert video is not None
    (frame, *_) = frames_of(video)
    assert (frame.width, frame.height) == expected.size
    assert turned_videos.white_side(frame.to_image()) == turned_videos.white_side(expected)


def write_video(path: Path, times: Sequence[int]) -> None:
    """Write a video whose frames have these times, in quarters of a second, and another colour every four frames."""
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height = official.SIZE, official.SIZE
        pictures = [
            Image.new("RGB", (official.SIZE, official.SIZE), official.COLOURS[i // 4]) for i in range(len(times))
        ]
        packets = [p for picture in pictures for p in stream.encode(av.VideoFrame.from_image(picture))]
        for i, (packet, time) in enumerate(zip([*packets, *stream.encode()], times, strict=True)):
            packet.pts, packet.dts, packet.time_base = time, min(time, times[1] - 1 + i), Fraction(1, 4)
            container.mux(packet)


WRONG_TIMES = {"first": [40, *range(1, 12)], "middle": [*range(6), 40, *range(7, 12)], "all later": range(40, 52)}


@pytest.mark.parametrize("times", WRONG_TIMES.values(), ids=WRONG_TIMES)
def test_a_wrong_time_neither_shifts_nor_repeats_other_frames(times: Sequence[int], tmp_path: Path) -> None:
    """The second second of the video is blue."""
    write_video(tmp_path / "video.mkv", times)
    whole, segment = encode(tmp_path / "video.mkv", 0.0, math.inf), encode(tmp_path / "video.mkv", 1.25, 1.75)
    assert whole is not None
    assert segment is not None
    assert seconds_of(whole) == pytest.approx(3, abs=0.5)
    assert {frame.to_ndarray(format="rgb24").mean((0, 1)).argmax() for frame in frames_of(segment)} == {2}


def test_a_video_with_an_enormous_time_is_named(tmp_path: Path) -> None:
    file = tmp_path / "video.m4v"
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height = official.SIZE, official.SIZE
        frame = av.VideoFrame.from_image(Image.new("RGB", (official.SIZE, official.SIZE)))
        packets = [*stream.encode(frame), *stream.encode(frame), *stream.encode()]
        for packet, time in zip(packets, (0, 10**10), strict=True):
            packet.pts, packet.dts, packet.time_base = time, time, Fraction(1)
            container.mux(packet)
    item = Item(Row(id="1", where="row 1", media=MediaNames(["video"])), file)
    with pytest.raises(DataError, match=r"video\.m4v is longer than 3600 s"):
        media(item)
    with pytest.raises(DataError, match=r"video\.m4v has no frame from 1e\+30 to 1e\+31 s"):
        media(replace(item, segment=(1e30, 1e31)))


def test_a_video_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    written("msvdqa", tmp_path)
    (tmp_path / "video" / "vid5.avi").write_bytes(film(["red"])[:100])
    item = read("msvdqa", tmp_path).items[0]
    with pytest.raises(DataError, match=r"vid5\.avi"):
        media(item)
