"""What a record says, in each published form, and what is wrong with those that say nothing."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from model.prompt import EndOfChunk, Media, Text
from training.config import SetConfig
from training.data.complaints import BadRecord
from training.data.records import Interleaved, parse
from training.data.shards import RawRecord

PAIRS = SetConfig(name="pairs", kind="pairs", shards="")
DOCUMENTS = replace(PAIRS, kind="documents")


def written(parsed: Interleaved) -> list[str]:
    """Segments as short words, a media as its file."""
    words = []
    for segment in parsed.example.segments:
        match segment:
            case Text(text):
                words.append(text)
            case Media(digest):
                words.append(f"<{parsed.files[digest].decode()}>")
            case EndOfChunk():
                words.append("|")
    return words


def document(content: Any, config: SetConfig = DOCUMENTS, files: dict[str, bytes] | None = None) -> list[str]:
    record = RawRecord("it", {"json": json.dumps(content).encode(), **(files or {})})
    return written(parse(record, config, Random(0)))


def mmc4(*images: tuple[bytes, int, float]) -> dict[str, Any]:
    return {
        "text_list": ["one.", "two.", "three."],
        "image_info": [
            {"image_base64": base64.b64encode(file).decode(), "matched_text_index": place, "matched_sim": similarity}
            for file, place, similarity in images
        ],
    }


def test_a_pair_is_media_text_and_chunk_s_end_with_a_space_half_of_the_time() -> None:
    record = RawRecord("it", {"jpg": b"A", "txt": b"a cat \n"})
    seen = {tuple(written(parse(record, PAIRS, Random(seed)))) for seed in range(20)}
    assert seen == {("<A>", "a cat", "|"), ("<A>", " a cat", "|")}


def test_a_clip_is_a_pair_of_a_set_of_videos() -> None:
    record = RawRecord("it", {"mp4": b"V", "txt": b"run"})
    assert [w.strip() for w in written(parse(record, replace(PAIRS, kind="videos"), Random(0)))] == ["<V>", "run", "|"]
    with pytest.raises(BadRecord, match="no media: it has mp4, txt"):
        parse(record, PAIRS, Random(0))


def test_mmc4_images_stand_in_front_of_their_sentences_in_the_sentences_order() -> None:
    assert document(mmc4((b"B", 2, 0.3), (b"A", 0, 0.5))) == ["<A>", "one.", " two.", "|", "<B>", "three.", "|"]


def test_mmc4_images_that_fit_badly_or_were_not_had_are_left_out() -> None:
    content = mmc4((b"A", 0, 0.2), (b"B", 1, 0.9))
    content["image_info"].append({"matched_text_index": 2, "matched_sim": 0.9})
    assert document(content) == ["one.", "|", "<B>", "two.", " three.", "|"]


def test_obelics_keeps_the_page_s_order_with_images_inside_or_beside() -> None:
    inside = base64.b64encode(b"A").decode()
    content = {"texts": ["hello", None, None, "world"], "images": [None, inside, "2.jpg", None]}
    assert document(content, files={"2.jpg": b"B"}) == ["hello", "|", "<A>", "|", "<B>", "world", "|"]


def test_obelics_images_that_are_only_addresses_are_left_out() -> None:
    content = {"texts": [None, "a", None], "images": ["https://x.org/a.jpg", None, base64.b64encode(b"A").decode()]}
    assert document(content) == ["a", "|", "<A>", "|"]


@pytest.mark.parametrize(
    ("files", "config", "reason"),
    [
        ({"txt": b"a"}, PAIRS, "no media"),
        ({"jpg": b"a", "txt": b" "}, PAIRS, "no text"),
        ({"jpg": b"a", "txt": b"\xff"}, PAIRS, "text is not UTF-8"),
        ({"txt": b"a"}, DOCUMENTS, "no document"),
        ({"json": b"{"}, DOCUMENTS, "no document"),
        ({"json": b"[]"}, DOCUMENTS, "no document"),
        ({"json": b'{"text_list": ["a"], "image_info": [{"image_base64": "QQ=="}]}'}, DOCUMENTS, "not MMC4's form"),
        ({"json": b'{"texts": ["a"], "images": []}'}, DOCUMENTS, "not OBELICS' form"),
        ({"json": b'{"texts": [null], "images": ["%"]}'}, DOCUMENTS, "image is not base64"),
        ({"json": b'{"texts": ["a"], "images": [null]}'}, DOCUMENTS, "too few images"),
    ],
)
def test_a_bad_record_says_what_is_wrong(files: dict[str, bytes], config: SetConfig, reason: str) -> None:
    with pytest.raises(BadRecord) as caught:
        parse(RawRecord("it", files), config, Random(0))
    assert caught.value.reason == reason


def test_documents_with_too_few_images_can_be_passed_over() -> None:
    with pytest.raises(BadRecord, match="too few images: 1, the set wants 2"):
        document(mmc4((b"A", 0, 0.5)), replace(DOCUMENTS, min_media=2))
