"""Tests of the stream of examples: decoded media, bad records that are counted and logged, and resuming."""

from __future__ import annotations

import io
import logging
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from model.media import MediaLimits, load_image
from tests.tiny_models import VISION, prompt_tokenizer
from tests.training.toy import COLOURS, png
from training.config import SetConfig
from training.data.make import write_shards
from training.data.shards import RawRecord, ShardError
from training.data.stream import ShardStream, find_shards


def stream(folder: Path, records: list[RawRecord], **changes: object) -> ShardStream:
    write_shards(records, folder, 100)
    values: dict[str, object] = {"name": "toy", "kind": "pairs", "shards": str(folder / "*.tar"), **changes}
    config = SetConfig(**values)  # type: ignore[arg-type]
    return ShardStream(find_shards(config.shards), config, prompt_tokenizer(), VISION, seed=0)


GOOD = RawRecord("good", {"png": png(COLOURS["red"]), "txt": b"red"})
BROKEN = RawRecord("broken", {"png": b"\x89PNG\r\n\x1a\n", "txt": b"red"})
SILENT = RawRecord("silent", {"png": png(COLOURS["red"]), "txt": b""})


def test_an_image_becomes_the_encoders_pixels(tmp_path: Path) -> None:
    prepared = stream(tmp_path, [GOOD]).take()
    (pixels,) = prepared.media.values()
    assert pixels.shape == (1, 3, 8, 8)
    assert pixels[0, :, 0, 0].tolist() == [1.0, -1.0, -1.0]


def test_bad_records_are_skipped_counted_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = stream(tmp_path, [GOOD, BROKEN, SILENT, GOOD])
    with caplog.at_level(logging.WARNING):
        for _ in range(5):  # two complete epochs and the beginning of a third
            records.take()
    counts = records.bad_records.counts
    assert counts.keys() == {"media cannot be decoded", "no text"}
    assert all(count in (2, 3) for count in counts.values())
    line = "set toy: skipped record 000000.tar/000000001: media cannot be decoded"
    assert any(line in message for message in caplog.messages)


def test_a_stream_resumes_after_bad_records(tmp_path: Path) -> None:
    texts = [RawRecord(str(n), {"png": png((n * 20, 0, 0)), "txt": f"{n}".encode()}) for n in range(6)]
    mixed = [record for text in texts for record in (text, BROKEN)]
    uninterrupted, interrupted = (stream(tmp_path / name, mixed, window=4) for name in ("a", "b"))
    expected = [uninterrupted.take().tokens for _ in range(12)]
    first = [interrupted.take().tokens for _ in range(4)]
    state = interrupted.state()
    resumed = stream(tmp_path / "b2", mixed, window=4)
    resumed.load_state(state)
    assert first + [resumed.take().tokens for _ in range(8)] == expected


def test_names_need_not_be_utf_8(tmp_path: Path) -> None:
    records = stream(tmp_path, [GOOD])
    (shard,) = tmp_path.glob("*.tar")
    renamed = shard.rename(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.tar"))
    assert ShardStream([renamed], records.config, prompt_tokenizer(), VISION, seed=0).take().media


def test_too_many_bad_records_in_a_row_raise_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data.stream.MAX_BAD_IN_A_ROW", 10)
    with pytest.raises(
        ShardError, match=r"set toy: 10 bad records in a row; of all so far: no text \(10\); check the kind"
    ):
        stream(tmp_path, [SILENT]).take()


def test_media_that_cannot_be_decoded_are_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bytes] = []

    def decode(data: bytes, limits: MediaLimits) -> Image.Image:
        tried.append(data)
        return load_image(data, limits)

    monkeypatch.setattr("training.data.stream.load_image", decode)
    records = stream(tmp_path, [GOOD, BROKEN])
    for _ in range(5):
        records.take()
    assert tried.count(BROKEN.files["png"]) == 1
    assert records.bad_records.counts["media cannot be decoded"] > 1


def test_a_pattern_without_shards_raises_an_error(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no shard matches"):
        find_shards(str(tmp_path / "*.tar"))


@pytest.mark.parametrize("pattern", ["", "/", "x**y", "."])
def test_a_pattern_that_names_no_file_raises_an_error(pattern: str) -> None:
    with pytest.raises(ShardError, match="no shard matches"):
        find_shards(pattern)


def test_a_pattern_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a" / "b").mkdir(parents=True)
    files = [tmp_path / "a" / "b" / "1.tar", tmp_path / "a" / "0.tar"]
    for file in files:
        file.touch()
    assert find_shards("~/a/*.tar") == files[1:]
    assert find_shards("~/**/*.tar") == sorted(files)


def clip(seconds: int) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        track = container.add_stream("mpeg4", rate=4)
        track.width = track.height = 16
        track.time_base = Fraction(1, 4)
        for number in range(seconds * 4):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), min(number * 5, 255), np.uint8), format="rgb24")
            frame.pts = number
            container.mux(track.encode(frame))
        container.mux(track.encode())
    return out.getvalue()


def test_a_clip_has_one_frame_per_second(tmp_path: Path) -> None:
    videos = stream(tmp_path, [RawRecord("v", {"mp4": clip(3), "txt": b"grey"})], kind="videos")
    (pixels,) = videos.take().media.values()
    assert pixels.shape == (3, 3, 8, 8)
    assert pixels[0].mean() < pixels[1].mean() < pixels[2].mean()


def first_shade(videos: ShardStream) -> int:
    """Return the second of the next example's first frame, by its shade."""
    (pixels,) = videos.take().media.values()
    assert pixels.shape == (3, 3, 8, 8)
    assert pixels[0].mean() < pixels[1].mean() < pixels[2].mean()
    return round(float(pixels[0].mean() + 1) * 127.5 / 20)


def test_of_a_long_clip_consecutive_frames_from_a_random_one_are_used(tmp_path: Path) -> None:
    records = [RawRecord("v", {"mp4": clip(5), "txt": b"grey"})]
    videos = stream(tmp_path, records, kind="videos", max_frames=3)
    first = [first_shade(videos) for _ in range(5)]
    state = videos.state()
    later = [first_shade(videos) for _ in range(15)]
    assert set(first + later) == {0, 1, 2}
    resumed = stream(tmp_path / "again", records, kind="videos", max_frames=3)
    resumed.load_state(state)
    assert [first_shade(resumed) for _ in range(15)] == later


@pytest.mark.parametrize("content", [b"no video", clip(2)[:-200], clip(122)])
def test_a_bad_video_is_skipped(tmp_path: Path, content: bytes) -> None:
    records = [RawRecord("bad", {"mp4": content, "txt": b"a"}), RawRecord("good", {"mp4": clip(1), "txt": b"grey"})]
    videos = stream(tmp_path, records, kind="videos")
    for _ in range(2):
        assert [pixels.shape for pixels in videos.take().media.values()] == [(1, 3, 8, 8)]
    assert videos.bad_records.counts.keys() == {"media cannot be decoded"}
