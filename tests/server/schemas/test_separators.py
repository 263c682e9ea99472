"""Separators are counted outside of texts, in a time and a memory that do not depend on what texts contain."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import BodyTooLarge
from server.schemas import separators
from server.schemas.base import read
from server.schemas.models import EmbeddingsRequest
from server.schemas.separators import MAX_PLAIN_BYTES, MAX_SEPARATORS, SLICE, check_separators, has_at_least

TEXTS = st.text(st.sampled_from('a\\",:[{é\n '))
VALUES = st.recursive(
    TEXTS | st.integers(0, 9), lambda values: st.lists(values) | st.dictionaries(TEXTS, values), max_leaves=20
)


@pytest.mark.parametrize(
    "text",
    [
        "[" + ", ".join(["{}"] * 33) + "]",
        "if (x) { y[i] = 0; } " * 33,
        json.dumps({f"f{index}": index for index in range(9)}),
        'He said "yes": she said "no": ' * 5,
        ",\\" * 300,
    ],
)
def test_a_body_whose_texts_have_many_separators_is_accepted(text: str) -> None:
    body = json.dumps({"input": [text] * 2048}).encode()
    assert read(EmbeddingsRequest, body).input == [text] * 2048


def number_of(separator: bytes, value: Any) -> int:
    """The number of separators outside of texts."""
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    here = {
        b",": max(len(value) - 1, 0) if isinstance(value, dict | list) else 0,
        b":": len(value) if isinstance(value, dict) else 0,
        b"[": isinstance(value, list),
        b"{": isinstance(value, dict),
    }
    return here[separator] + sum(number_of(separator, part) for part in parts)


@given(value=VALUES, size=st.integers(1, 9))
def test_the_numbers_are_those_of_the_values_wherever_the_data_are_cut(value: Any, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(separators, "SLICE", size)
        counted = Counter[bytes]()
        check_separators(json.dumps(value, ensure_ascii=False).encode(), MAX_SEPARATORS, "it", counted)
    assert counted == {separator: number_of(separator, value) for separator in MAX_SEPARATORS}


class Sliced(bytes):
    """Data of which no call reads more than a slice: a call keeps all other threads waiting."""

    def count(self, *arguments: Any) -> int:
        assert len(self) <= SLICE
        return super().count(*arguments)

    def replace(self, *arguments: Any) -> bytes:
        assert len(self) <= SLICE
        return super().replace(*arguments)

    def __getitem__(self, index: Any) -> Any:
        assert index.stop - index.start <= SLICE
        return super().__getitem__(index)


@pytest.mark.parametrize("data", [b'" : ', b'\\"', b'":', b":,[{"])
def test_no_call_keeps_the_interpreter_or_much_memory(data: bytes) -> None:
    body = Sliced(data * (16 * SLICE // len(data)))
    tracemalloc.start()
    try:
        check_separators(body, dict.fromkeys(MAX_SEPARATORS, len(body) // 8), "it")
    except BodyTooLarge:
        pass
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < 32 * SLICE  # one match of 16 slices takes 40 bytes and a place in a list


def test_texts_that_look_like_names_are_counted_until_the_limit() -> None:
    with pytest.raises(BodyTooLarge, match="it has more than 3 names of fields"):
        check_separators(b'{"a":1,"b" :2,"c":"::::","d"\n:4}', {b":": 3}, "it")


@pytest.mark.parametrize("number", [b"9" * 4299, b"9" * 299, b"0." + b"9" * 4297])
def test_a_body_of_long_numbers_is_refused_unparsed(number: bytes) -> None:
    """A body of 60 MiB of them held the interpreter for most of a second."""
    numbers = b",".join([number] * (MAX_PLAIN_BYTES // len(number) + 1))
    with pytest.raises(BodyTooLarge, match=f"the body has more than {MAX_PLAIN_BYTES} bytes outside of texts"):
        read(EmbeddingsRequest, b'{"input": ["a", ' + numbers + b"]}")


def test_a_body_may_have_the_most_token_ids_or_more_bytes_in_texts() -> None:
    check_separators(json.dumps([65535] * 2**19).encode(), MAX_SEPARATORS, "it")
    check_separators(b'["' + b"9" * 2 * MAX_PLAIN_BYTES + b'"]', MAX_SEPARATORS, "it")


@given(data=st.text("a,").map(str.encode), size=st.integers(1, 9))
def test_a_byte_is_counted_wherever_the_data_are_cut(data: bytes, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(separators, "SLICE", size)
        number = data.count(b",")
        assert has_at_least(number, b",", data)
        assert not has_at_least(number + 1, b",", data)
