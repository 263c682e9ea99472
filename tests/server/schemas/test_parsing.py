"""A body that is not JSON is answered with what it is instead."""

from __future__ import annotations

import pytest

from server.errors import InvalidRequest
from server.schemas.base import read
from server.schemas.generation import CompletionRequest

JSON = '{"prompt": "x"}'
BYTE_ORDER_MARK = "it begins with a byte order mark: send UTF-8 without one"
WIDE = "it looks like UTF-16 or UTF-32: send UTF-8"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"prompt":"x","max_tokens":1,"max_tokens":2}', "max_tokens: set more than once, at line 1 column 43"),
        (b'{"prompt":"x","n":null,"\\u006e":1}', "n: set more than once, at line 1 column 33"),
        (
            b'{"prompt":[{"type":"text","text":"a",\n"text":"b"}]}',
            "prompt[0].text: set more than once, at line 2 column 8",
        ),
        (
            b'{"prompt":"x","structured_outputs":{"json":{"a":[{},{"b":1,"b":2}]}}}',
            "structured_outputs.json.a[1].b: set more than once, at line 1 column 64",
        ),
        (b'{"n":{"n":1,"n":2},"n":3}', "n: set more than once, at line 1 column 17"),
        (b'{"prompt":{"n":1,"n":2},"o":', "n: set more than once, at line 1 column 22"),
        (b'{"prompt":{"n":1,"n":2},"o":"%s"}' % (b"x" * 2**20), "n: set more than once, at line 1 column 22"),
        (
            b'{"a":1,"%s":1,"%s":1}' % (b"n" * 1000, b"n" * 1000),
            f"{'n' * 64}: set more than once, at line 1 column 2016",
        ),
    ],
)
def test_a_name_that_occurs_twice_in_an_object_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        read(CompletionRequest, body)
    assert (refusal.value.message, refusal.value.param) == (message, message.partition(":")[0])


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b"", "it is empty"),
        (JSON.encode("utf-8-sig"), BYTE_ORDER_MARK),
        *((JSON.encode(encoding), WIDE) for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be")),
        (b"{\0}", WIDE),
        (b"{}\0", "trailing characters at line 1 column 3"),
        (JSON.encode().replace(b"x", b"\xe9"), "invalid unicode code point at line 1 column 13"),
    ],
)
def test_a_body_that_is_not_json_is_refused_with_its_encoding_if_that_is_the_fault(body: bytes, fault: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        read(CompletionRequest, body)
    assert refusal.value.message == f"the body is not JSON: {fault}"
