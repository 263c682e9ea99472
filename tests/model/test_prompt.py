"""Prompts: the markers of each family, the media that a token reads, and text that cannot become a marker."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ConfigError, PromptConfig
from model.prompt import EndOfChunk, Media, PromptError, Segment, Text, encode
from tests.tiny_models import PROMPT, prompt_tokenizer

A, B = Media(b"a" * 32), Media(b"b" * 32)
FAKE = "</s>"
IDEFICS = PromptConfig(
    media_token="<image>",
    begin="<|endofchunk|>",
    media_open=FAKE,
    media_close=FAKE,
    strip_text=True,
    text_separator="<|endofchunk|>",
)


def written(segments: list[Segment], prompt: PromptConfig) -> str:
    tokenizer = prompt_tokenizer(prompt)
    return tokenizer.decode(encode(segments, tokenizer).token_ids, skip_special_tokens=False)


def test_openflamingo_writes_media_and_end_of_chunk() -> None:
    segments: list[Segment] = [A, Text("Output:a cat"), EndOfChunk(), B, Text("Output:")]
    assert written(segments, PROMPT) == "<image>Output:a cat<|endofchunk|><image>Output:"


def test_idefics_shares_the_marker_between_media_and_strips_text() -> None:
    segments: list[Segment] = [Text(" a "), A, B, Text(" b"), Text("c ")]
    begin, turn = "<|endofchunk|>", "<|endofchunk|>"
    assert written(segments, IDEFICS) == f"{begin}a{FAKE}<image>{FAKE}<image>{FAKE}b{turn}c"


def test_a_token_reads_the_last_media_at_or_before_it() -> None:
    encoded = encode([Text("x"), A, Text("yz"), EndOfChunk(), B, Text("w")], prompt_tokenizer())
    assert encoded.media_index == [-1, 0, 0, 0, 0, 1, 1]
    assert encoded.media == [A.digest, B.digest]


def test_a_media_item_may_appear_twice() -> None:
    encoded = encode([A, Text("x"), A, Text("y")], prompt_tokenizer())
    assert encoded.media_index == [0, 0, 1, 1]
    assert encoded.media == [A.digest, A.digest]


@given(st.lists(st.sampled_from(["<image>", "<|endofchunk|>", "</s>", "<", "image>", " ", "é", "x"]), max_size=8))
def test_text_never_becomes_a_marker(pieces: list[str]) -> None:
    tokenizer = prompt_tokenizer()
    text = "".join(pieces)
    encoded = encode([A, *map(Text, pieces), Text("")], tokenizer)
    assert encoded.token_ids[0] == tokenizer.media_token_id
    assert all(token_id < 256 for token_id in encoded.token_ids[1:])
    assert tokenizer.decode(encoded.token_ids[1:], skip_special_tokens=False) == text


def test_the_first_token_of_a_familys_prompts_is_the_prefix_that_all_spans_read() -> None:
    """A family without one has no common first token: its first span is empty."""
    segments: list[Segment] = [A, Text("x"), B, Text("y")]
    encoded = encode(segments, prompt_tokenizer(replace(PROMPT, begin=FAKE)))
    assert (encoded.media_index, encoded.span_starts) == ([-1, 0, 0, 1, 1], [0, 1, 3])
    assert encode(segments, prompt_tokenizer(PROMPT)).span_starts == [0, 0, 2]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(PromptError, match="empty"):
        encode([Text("")], prompt_tokenizer())


def test_end_of_chunk_is_refused_where_the_family_has_none() -> None:
    with pytest.raises(PromptError, match="no end-of-chunk token"):
        encode([Text("a"), EndOfChunk()], prompt_tokenizer(PromptConfig(media_token="<image>")))


def test_a_marker_that_is_not_a_token_is_named() -> None:
    with pytest.raises(ConfigError, match="'<picture>' is not a token"):
        prompt_tokenizer(PromptConfig(media_token="<picture>"))
