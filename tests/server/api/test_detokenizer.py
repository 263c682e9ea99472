"""The pieces of a text equal the whole text, and end at stop strings."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from model.prompt import PromptTokenizer
from server.api.answer_text import Detokenizer, StopStrings, token_text
from tests.tiny_models import PROMPT, byte_tokenizer, prompt_tokenizer

BYTES = prompt_tokenizer()


def llama_like() -> PromptTokenizer:
    """Return a tokenizer like Llama's: words begin with `▁`, other text is bytes, and the first space is removed."""
    words = [
        "<unk>",
        "</s>",
        "<image>",
        "<|endofchunk|>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁a",
        "▁cat",
        "s",
        "▁",
    ]

    def build() -> Tokenizer:
        vocabulary = {word: i for i, word in enumerate(words)}
        tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        tokenizer.add_special_tokens(["</s>", "<image>", "<|endofchunk|>"])
        return tokenizer

    return PromptTokenizer(build(), build(), PROMPT)


LLAMA = llama_like()


def pieces(tokenizer: PromptTokenizer, ids: list[int], context: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer, context or [])
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@given(st.text(max_size=40))
def test_text_is_complete_and_never_contains_half_a_character(text: str) -> None:
    parts = pieces(BYTES, BYTES.encode_plain(text))
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


@given(st.text(max_size=20), st.text(max_size=20))
def test_the_context_is_not_repeated(before: str, text: str) -> None:
    assert "".join(pieces(BYTES, BYTES.encode_plain(text), BYTES.encode_plain(before))) == text


@given(st.lists(st.integers(0, BYTES.id_of("<|endofchunk|>")), max_size=40))
def test_any_ids_decode_as_with_the_tokenizer_except_broken_characters(ids: list[int]) -> None:
    joined, whole = "".join(pieces(BYTES, ids)), BYTES.decode(ids)
    assert joined.replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_a_character_of_several_tokens_is_returned_with_the_last_one() -> None:
    assert pieces(BYTES, BYTES.encode_plain("a€b")) == ["a", "", "", "€", "b", ""]


def test_bytes_that_never_form_a_character_do_not_hold_the_text_back() -> None:
    broken = BYTES.encode_plain("€")[0]
    detokenizer = Detokenizer(BYTES)
    assert sum(bool(detokenizer.push(broken)) for _ in range(40)) >= 4


@pytest.mark.parametrize("character", ["¡", "€", "😀"])
@pytest.mark.parametrize("num_broken", range(10))
def test_a_character_after_broken_bytes_is_shown(character: str, num_broken: int) -> None:
    broken = BYTES.encode_plain("€")[:1] * num_broken
    assert "".join(pieces(BYTES, [*broken, *BYTES.encode_plain(character)])).endswith(character)


def test_a_space_after_the_prompt_is_kept() -> None:
    a, cat, s = (LLAMA.id_of(word) for word in ("▁a", "▁cat", "s"))
    assert pieces(LLAMA, [cat, s], context=[a]) == [" cat", "s", ""]
    assert pieces(LLAMA, [cat, s]) == ["cat", "s", ""]


@pytest.mark.parametrize("text", ["a €", "naïve 😀 cat"])
def test_byte_fallback_characters_are_complete(text: str) -> None:
    ids = [LLAMA.id_of(f"<0x{byte:02X}>") for byte in text.encode()]
    parts = pieces(LLAMA, ids)
    assert "".join(parts) == LLAMA.decode(ids)
    assert all("\ufffd" not in part for part in parts)


def push_all(stop: list[str], texts: list[str], *, include: bool = False) -> tuple[list[str], bool]:
    checker = StopStrings(stop, include=include)
    pushed = [checker.push(text) for text in texts]
    return [*pushed, checker.finish()], checker.is_stopped


def test_a_stop_string_over_several_pieces_is_never_returned() -> None:
    assert push_all(["STOP"], ["a S", "TO", "P b"]) == (["a ", "", "", ""], True)


def test_text_that_only_begins_like_a_stop_string_is_returned_later() -> None:
    assert push_all(["STOP"], ["a S", "TO", "x", "S"]) == (["a ", "", "STOx", "", "S"], False)


def test_the_stop_string_can_be_included() -> None:
    assert push_all(["\n\n"], ["a\n", "\nb"], include=True) == (["a", "\n\n", ""], True)


def test_the_first_complete_stop_string_counts() -> None:
    assert push_all(["abcd", "bc"], ["xab", "cd"]) == (["x", "a", ""], True)


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), min_size=30, max_size=30),
)
def test_the_pieces_do_not_change_where_the_text_stops(text: str, stop: list[str], cuts: list[int]) -> None:
    ends = [end for end in range(1, len(text) + 1) if any(text[:end].endswith(s) for s in stop)]
    expected = (
        text if not ends else min((text[: ends[0] - len(s)] for s in stop if text[: ends[0]].endswith(s)), key=len)
    )
    texts, rest = [], text
    for cut in cuts:
        texts.append(rest[:cut])
        rest = rest[cut:]
    parts, is_stopped = push_all(stop, [*texts, rest])
    assert "".join(parts) == expected
    assert is_stopped == bool(ends)


def test_a_token_without_text_is_named_by_its_vocabulary_entry() -> None:
    assert token_text(BYTES, BYTES.encode_plain("a")[0]) == "a"
    assert token_text(BYTES, BYTES.encode_plain(" ")[0]) == " "
    assert token_text(BYTES, BYTES.encode_plain("€")[0]) == byte_tokenizer().id_to_token(BYTES.encode_plain("€")[0])
    assert token_text(BYTES, BYTES.media_token_id) == "<image>"
    assert token_text(LLAMA, LLAMA.id_of("▁cat")) == " cat"


def test_a_stop_string_that_repeats_itself_costs_a_few_comparisons_per_character() -> None:
    """Otherwise 16 stop strings of 1,024 characters each take milliseconds per token."""

    class Counting(str):
        num_compared = 0

        def __getitem__(self, key: Any) -> str:
            Counting.num_compared += 1
            return super().__getitem__(key)

    length = 1000
    checker = StopStrings([Counting("ab" * length), Counting("c" * 2 * length)], include=False)
    Counting.num_compared = 0
    for _ in range(4):
        for _ in range(length - 1):
            checker.push("ab")
        checker.push("b")
    assert Counting.num_compared < 6 * 2 * (4 * 2 * length)
