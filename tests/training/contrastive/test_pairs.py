"""Tests of the stream of pairs for contrastive pretraining."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from PIL import Image

from model.media import MediaLimits, load_image
from tests.tiny_models import VISION, byte_tokenizer
from tests.training.contrastive.shapes import draw_shape
from training.contrastive.config import PairsConfig
from training.contrastive.data import PairReader, PairStream
from training.data.make import write_shards
from training.data.shards import RawRecord
from training.data.stream import find_shards

GOOD = RawRecord("good", {"png": draw_shape("red", "square", Random(0)), "txt": b"a red square"})
BROKEN = RawRecord("broken", {"png": b"no image", "txt": b"a blue ring"})


def test_images_that_cannot_be_decoded_are_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bytes] = []

    def decode(data: bytes, limits: MediaLimits) -> Image.Image:
        tried.append(data)
        return load_image(data, limits)

    monkeypatch.setattr("training.contrastive.data.load_image", decode)
    write_shards([GOOD, BROKEN], tmp_path, 10)
    reader = PairReader(byte_tokenizer(), VISION, max_tokens=24, augment=False)
    config = PairsConfig(name="toy", shards=str(tmp_path / "*.tar"), batch_size=5)
    stream = PairStream(find_shards(config.shards), config, reader, seed=0)
    stream.batch()
    assert tried.count(BROKEN.files["png"]) == 1
    assert stream.bad_records.counts["media cannot be decoded"] > 1
