"""Tests of parsing records in each published format, and of the reasons for bad records."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from model.prompt import EndOfChunk, Media, Text
from training.config import SetConfig
from training.data.bad_record_log import BadRecord
from training.data.records import Interleaved, parse
from training.data.shards import RawRecord

PAIRS = SetConfig(name="pairs", kind="pairs", shards="")
DOCUMENTS = replace(PAIRS, kind="documents")
# a document in MMC4's format with the index and the similarity of its image
MATCHED = b'{"text_list": ["a"], "image_info": [{"image_base64": "QQ==", "matched_text_index": %b, "matched_sim": %b}]}'


def segment_texts(parsed: Interleaved) -> list[str]:
    """Return the segments as short texts: a media item as its file's content, an end of chunk as "|"."""
    texts = []
    for segment in parsed.example.segments:
        match segment:
            case Text(text):
                texts.append(text)
            case Media(digest):
                texts.append(f"<{parsed.files[digest].decode()}>")
            case EndOfChunk():
                texts.append("|")
    return texts


def parse_document(
    content: Any, config: SetConfig = DOCUMENTS, files: dict[str, bytes] | None = None, name: str = "it"
) -> list[str]:
    record = RawRecord(name, {"json": json.dumps(content).encode(), **(files or {})})
    return segment_texts(parse(record, config, Random(0)))


def mmc4(*images: tuple[bytes, int, float]) -> dict[str, Any]:
    return {
        "text_list": ["one.", "two.", "three."],
        "image_info": [
            {"image_base64": base64.b64encode(file).decode(), "matched_text_index": index, "matched_sim": similarity}
            for file, index, similarity in images
        ],
    }


def test_a_pair_is_media_text_and_end_of_chunk_with_a_space_half_of_the_time() -> None:
    record = RawRecord("it", {"jpg": b"A", "txt": b"a cat \n"})
    texts = {tuple(segment_texts(parse(record, PAIRS, Random(seed)))) for seed in range(20)}
    assert texts == {("<A>", "a cat", "|"), ("<A>", " a cat", "|")}


def test_a_byte_order_mark_is_no_part_of_a_text() -> None:
    pair = RawRecord("it", {"jpg": b"A", "txt": "\ufeffa cat".encode()})
    assert segment_texts(parse(pair, PAIRS, Random(0)))[1].strip() == "a cat"
    document = RawRecord("it", {"json": "\ufeff".encode() + MATCHED % (b"0", b"1")})
    assert segment_texts(parse(document, DOCUMENTS, Random(0)))[0] == "<A>"


def test_a_clip_is_a_pair_in_a_set_of_videos() -> None:
    record = RawRecord("it", {"mp4": b"V", "txt": b"run"})
    texts = segment_texts(parse(record, replace(PAIRS, kind="videos"), Random(0)))
    assert [text.strip() for text in texts] == ["<V>", "run", "|"]
    with pytest.raises(BadRecord, match="no media: its files are mp4, txt"):
        parse(record, PAIRS, Random(0))


def test_mmc4_images_precede_their_sentences_in_the_sentences_order() -> None:
    assert parse_document(mmc4((b"B", 2, 0.3), (b"A", 0, 0.5))) == ["<A>", "one.", " two.", "|", "<B>", "three.", "|"]


def test_mmc4_images_with_low_similarity_or_without_data_are_skipped() -> None:
    content = mmc4((b"A", 0, 0.2), (b"B", 1, 0.9))
    content["image_info"].append({"matched_text_index": 2, "matched_sim": 0.9})
    assert parse_document(content) == ["one.", "|", "<B>", "two.", " three.", "|"]


def test_obelics_keeps_the_pages_order_with_images_in_the_json_or_in_files() -> None:
    embedded = base64.b64encode(b"A").decode()
    content = {"texts": ["hello", None, None, "world"], "images": [None, embedded, "2.jpg", None]}
    assert parse_document(content, files={"2.jpg": b"B"}) == ["hello", "|", "<A>", "|", "<B>", "world", "|"]


def test_an_image_may_have_the_key_of_its_record() -> None:
    content = {"texts": [None, "a", None], "images": ["0.jpg", None, "1.jpg"]}
    expected = ["<A>", "a", "|", "<B>", "|"]
    for name in ("shard.tar/0", "shard.tar/1", "shard.tar/2"):
        assert parse_document(content, files={"0.jpg": b"A", "1.jpg": b"B"}, name=name) == expected
    assert parse_document(content, files={"jpg": b"A", "1.jpg": b"B"}, name="shard.tar/0") == expected


@pytest.mark.parametrize("missing", ["https://x.org/a.jpg", None])
def test_the_texts_of_a_missing_image_are_left_out(missing: str | None) -> None:
    images = [base64.b64encode(name).decode() for name in (b"A", b"B")]
    content = {
        "texts": ["top", None, "a", None, "lost", "lost too", None, "b", None, "lost"],
        "images": [None, images[0], None, missing, None, None, images[1], None, missing, None],
    }
    assert parse_document(content) == ["top", "|", "<A>", "a", "|", "<B>", "b", "|"]


def test_texts_after_a_missing_first_image_are_left_out() -> None:
    content = {"texts": [None, "a", None], "images": ["https://x.org/a.jpg", None, base64.b64encode(b"A").decode()]}
    assert parse_document(content) == ["<A>", "|"]


@pytest.mark.parametrize(
    ("files", "config", "reason"),
    [
        ({"txt": b"a"}, PAIRS, "no media"),
        ({"jpg": b"a", "txt": b" "}, PAIRS, "no text"),
        ({"jpg": b"a", "txt": b"\xff"}, PAIRS, "text is not UTF-8"),
        ({"txt": b"a"}, DOCUMENTS, "no document"),
        ({"json": b"{"}, DOCUMENTS, "no document"),
        ({"json": b"[]"}, DOCUMENTS, "no document"),
        ({"json": b'{"text_list": ["a"], "image_info": [{"image_base64": "QQ=="}]}'}, DOCUMENTS, "not MMC4's format"),
        ({"json": b'{"text_list": null, "image_info": []}'}, DOCUMENTS, "not MMC4's format"),
        ({"json": b'{"text_list": ["a", null], "image_info": []}'}, DOCUMENTS, "not MMC4's format"),
        ({"json": b'{"text_list": ["a"], "image_info": ["b"]}'}, DOCUMENTS, "not MMC4's format"),
        ({"json": b'{"text_list": ["a"], "image_info": null}'}, DOCUMENTS, "not MMC4's format"),
        ({"json": MATCHED % (b"1", b"0.9")}, DOCUMENTS, "not MMC4's format"),
        ({"json": MATCHED % (b"-1", b"0.9")}, DOCUMENTS, "not MMC4's format"),
        ({"json": MATCHED % (b"[]", b"0.9")}, DOCUMENTS, "not MMC4's format"),
        ({"json": MATCHED % (b"0", b'"high"')}, DOCUMENTS, "not MMC4's format"),
        ({"json": b'{"texts": [null, "\\ud800"], "images": ["QQ==", null]}'}, DOCUMENTS, "text is not Unicode"),
        ({"json": b"[" * 100_000}, DOCUMENTS, "no document"),
        ({"json": b'{"texts": ["a"], "images": []}'}, DOCUMENTS, "not OBELICS' format"),
        ({"json": b'{"texts": ["a"], "images": ["QQ=="]}'}, DOCUMENTS, "not OBELICS' format"),
        ({"json": b'{"texts": [1], "images": [null]}'}, DOCUMENTS, "not OBELICS' format"),
        ({"json": b'{"texts": [null], "images": [1]}'}, DOCUMENTS, "not OBELICS' format"),
        (
            {"json": b'{"texts": [null], "images": ["%"]}'},
            DOCUMENTS,
            "image is neither a file of its record nor base64",
        ),
        ({"json": b'{"texts": ["a"], "images": [null]}'}, DOCUMENTS, "too few images"),
    ],
)
def test_a_bad_record_has_a_reason(files: dict[str, bytes], config: SetConfig, reason: str) -> None:
    with pytest.raises(BadRecord) as raised:
        parse(RawRecord("it", files), config, Random(0))
    assert raised.value.reason == reason


def test_documents_with_too_few_images_are_bad_records() -> None:
    with pytest.raises(BadRecord, match="too few images: 1, the set requires 2"):
        parse_document(mmc4((b"A", 0, 0.5)), replace(DOCUMENTS, min_media=2))
