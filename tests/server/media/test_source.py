"""Media by digest: what names them, and what is refused before a byte is decoded."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import InvalidMedia, InvalidRequest
from server.media.source import read_data_url, source_digest


def read(url: str, max_bytes: int = 100) -> bytes:
    return read_data_url(url, "image", max_bytes=max_bytes, param="here").data


@given(
    st.binary(min_size=1, max_size=100), st.sampled_from(["image/png", "IMAGE/JPEG", "", "application/octet-stream"])
)
def test_what_was_sent_is_what_is_read(data: bytes, media_type: str) -> None:
    media = read_data_url(
        f"data:{media_type};base64,{base64.b64encode(data).decode()}", "image", max_bytes=100, param="here"
    )
    assert (media.data, media.param, media.kind) == (data, "here", "image")
    assert media.digest == source_digest(data, "image")


def test_a_digest_has_256_bits_and_knows_the_kind() -> None:
    image, video, other = source_digest(b"x", "image"), source_digest(b"x", "video"), source_digest(b"y", "image")
    assert len(image) == 32
    assert len({image, video, other}) == 3


@pytest.mark.parametrize("size", [100, 101])
def test_the_limit_is_in_bytes_not_in_letters(size: int) -> None:
    url = f"data:;base64,{base64.b64encode(bytes(size)).decode()}"
    if size == 100:
        assert len(read(url)) == size
    else:
        with pytest.raises(InvalidMedia, match="101 bytes of media, the limit is 100"):
            read(url)


@pytest.mark.parametrize(
    "url", ["http://a/b.png", "file:///etc/passwd", "ftp://a", "picture.png", "", "data:image/png,%00", "data:,"]
)
def test_all_else_is_no_data_url(url: str) -> None:
    with pytest.raises(InvalidRequest):
        read(url)


@pytest.mark.parametrize("payload", ["", "a", "ab", "ab=", "a b=", "abc-", "YQ==YQ==", "YQ==\n", "é"])
def test_base64_is_read_strictly(payload: str) -> None:
    with pytest.raises(InvalidMedia):
        read(f"data:image/png;base64,{payload}")
