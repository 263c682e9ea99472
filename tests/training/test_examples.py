"""Tests of tokens and targets: the loss's rules, windows, media limits, and text that reads the next image."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from model.prompt import EndOfChunk, Media, Segment, Text
from tests.tiny_models import prompt_tokenizer
from training.examples import Example, Limits, Tokens, tokenize

TOKENIZER = prompt_tokenizer()
WIDE = Limits(max_tokens=256, max_media=5)
IMAGE, EOC, EOS = TOKENIZER.media_token_id, TOKENIZER.id_of("<|endofchunk|>"), TOKENIZER.id_of("</s>")


def tokens(*segments: Segment, limits: Limits = WIDE, seed: int = 0, answers: frozenset[int] | None = None) -> Tokens:
    return tokenize(Example(name="it", segments=segments, answers=answers), TOKENIZER, limits, Random(seed))


def target_text(sequence: Tokens) -> str:
    return TOKENIZER.decode(
        [t for t, flag in zip(sequence.token_ids, sequence.target, strict=True) if flag], skip_special_tokens=False
    )


def test_a_pairs_targets_are_its_text_the_end_of_chunk_and_the_end_of_text() -> None:
    assert target_text(tokens(Media(b"1"), Text("cat"), EndOfChunk())) == "cat<|endofchunk|></s>"


def test_text_before_the_first_image_or_between_a_chunks_end_and_the_next_image_is_no_target() -> None:
    sequence = tokens(
        Text("ab"), Media(b"1"), Text("cd"), EndOfChunk(), Text("ef"), Media(b"2"), Text("gh"), EndOfChunk()
    )
    assert target_text(sequence) == "cd<|endofchunk|>gh<|endofchunk|></s>"


def test_a_media_token_is_never_a_target() -> None:
    sequence = tokens(Media(b"1"), Media(b"2"), Text("x"), EndOfChunk())
    assert not any(flag for token, flag in zip(sequence.token_ids, sequence.target, strict=True) if token == IMAGE)


@pytest.mark.parametrize("p_next", [0.0, 1.0])
def test_a_model_without_an_end_of_chunk_learns_texts_and_the_end_of_the_text(p_next: float) -> None:
    fake = "<|endofchunk|>"  # as IDEFICS writes media
    prompt = replace(
        TOKENIZER.prompt,
        end_of_chunk="",
        media_open=fake,
        media_close=fake,
        eos=("</s>",),
        suppressed=("<image>", fake),
    )
    tokenizer = prompt_tokenizer(prompt)
    segments = (Text("ab"), EndOfChunk(), Media(b"1"), Text("cd"), EndOfChunk(), Media(b"2"), Text("ef"), EndOfChunk())
    sequence = tokenize(Example(name="it", segments=segments), tokenizer, replace(WIDE, p_next=p_next), Random(0))
    written = TOKENIZER.decode(sequence.token_ids, skip_special_tokens=False)
    assert written == f"ab{fake}<image>{fake}cd{fake}<image>{fake}ef</s>"
    assert target_text(sequence) == ("bcd" if p_next else "cdef</s>")


def test_with_p_next_text_reads_the_next_image_and_the_last_text_none() -> None:
    segments = (Text("ab"), EndOfChunk(), Media(b"1"), Text("cd"), EndOfChunk(), Media(b"2"), Text("ef"), EndOfChunk())
    sequence = tokens(*segments, limits=Limits(max_tokens=256, max_media=5, p_next=1.0))
    assert sequence.media_index == [0, 0, 0, 0, 1, 1, 1, 1, -1, -1, -1, -1]
    assert target_text(sequence) == "b<|endofchunk|>cd<|endofchunk|>"


def test_p_next_is_drawn_once_per_document() -> None:
    limits = Limits(max_tokens=256, max_media=5, p_next=0.5)
    media_indices = {
        tuple(tokens(Text("a"), Media(b"1"), Text("b"), EndOfChunk(), limits=limits, seed=seed).media_index)
        for seed in range(20)
    }
    assert media_indices == {(-1, 0, 0, 0, 0), (0, 0, -1, -1, -1)}


def test_a_sequence_ends_before_the_first_media_item_over_the_limit() -> None:
    segments = [part for n in range(4) for part in (Media(bytes([n])), Text("x"), EndOfChunk())]
    sequence = tokens(*segments, limits=Limits(max_tokens=256, max_media=2))
    assert sequence.media == [b"\0", b"\1"]
    assert sequence.token_ids.count(IMAGE) == 2
    assert sequence.token_ids[-1] == EOC


@pytest.mark.parametrize("p_next", [0.0, 1.0])
def test_what_follows_the_media_limit_has_no_target_that_reads_media_within_it(p_next: float) -> None:
    segments = [part for n in range(8) for part in (Media(bytes([n])), Text("abc"[: n % 3 + 1]), EndOfChunk())]
    limited = tokens(*segments, limits=Limits(max_tokens=256, max_media=5, p_next=p_next))
    whole = tokens(*segments, limits=Limits(max_tokens=256, max_media=8, p_next=p_next))
    assert limited.media == whole.media[:5]
    end = len(limited.token_ids)
    assert whole.token_ids[:end] == limited.token_ids
    assert [t for t, index in enumerate(whole.media_index) if index in range(5) and t >= end] == []
    # with `p_next`, the text before the sixth image would read it, and reads none
    read = [index if index < 5 else -1 for index in whole.media_index[:end]]
    assert limited.media_index == read
    assert limited.target == [flag and index >= 0 for flag, index in zip(whole.target[:end], read, strict=True)]


def test_a_window_lies_anywhere_in_a_page() -> None:
    letters = "abcdefghij"
    limits = Limits(max_tokens=4, max_media=5)
    windows = {tuple(tokens(Text(letters), limits=limits, seed=seed).token_ids) for seed in range(200)}
    page = [*TOKENIZER.encode_plain(letters), EOS]
    assert windows == {tuple(page[first : first + 4]) for first in range(len(page) - 3)}


def test_a_caption_that_is_too_long_keeps_its_image_and_is_cut() -> None:
    limits = Limits(max_tokens=4, max_media=5)
    for seed in range(20):
        sequence = tokens(Media(b"1"), Text("abcdefghij"), EndOfChunk(), limits=limits, seed=seed)
        assert target_text(sequence) == "abc"


def test_a_window_contains_media_if_the_page_does() -> None:
    limits = Limits(max_tokens=4, max_media=5)
    for seed in range(50):
        page = (Text("abcdef"), Media(b"1"), Text("cd"), Media(b"2"), Text("efghijkl"), EndOfChunk())
        assert tokens(*page, limits=limits, seed=seed).num_targets
        assert tokens(*page[3:], limits=limits, seed=seed).num_targets


@pytest.mark.parametrize("seed", range(8))
def test_a_window_keeps_each_media_with_its_token(seed: int) -> None:
    letters = "abcdefgh"
    segments = [part for letter in letters for part in (Media(letter.encode()), Text(letter), EndOfChunk())]
    sequence = tokens(*segments, limits=Limits(max_tokens=7, max_media=5), seed=seed)
    assert len(sequence.token_ids) <= 7
    for token, index in zip(sequence.token_ids, sequence.media_index, strict=True):
        if token not in (IMAGE, EOC, EOS) and index >= 0:
            assert sequence.media[index].decode() == TOKENIZER.decode([token])


def test_only_answers_are_targets() -> None:
    segments = (
        Media(b"1"),
        Text("is"),
        Text(" dax"),
        EndOfChunk(),
        Media(b"1"),
        Text("is"),
        Text(" dax"),
        EndOfChunk(),
    )
    sequence = tokens(*segments, answers=frozenset({6, 7}))
    assert target_text(sequence) == " dax<|endofchunk|>"
    assert sequence.media_index[-1] == 1


def test_an_example_with_answers_over_the_limits_is_refused() -> None:
    with pytest.raises(ValueError, match="example it has 4 tokens and 1 media, the limits are 3 and 5"):
        tokens(Media(b"1"), Text("abc"), answers=frozenset({1}), limits=Limits(max_tokens=3, max_media=5))
