"""Ids and digests of media, and data URLs: which ones are refused before their data is decoded."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.caches.media import SOURCE_BYTES
from server.engine_client.salt import salted_media
from server.errors import InvalidMedia, InvalidRequest
from server.media.source import DIGEST_BYTES, LARGE_URL, digest_of, encoded, kind_of, read_data_url


def read(url: str, max_bytes: int = 100) -> bytes:
    return read_data_url(url, "image", max_bytes=max_bytes, param="image").data


@given(
    st.binary(min_size=1, max_size=100), st.sampled_from(["image/png", "IMAGE/JPEG", "", "application/octet-stream"])
)
def test_a_data_url_is_read_as_it_was_sent(data: bytes, media_type: str) -> None:
    media = read_data_url(
        f"data:{media_type};base64,{base64.b64encode(data).decode()}", "image", max_bytes=100, param="image"
    )
    assert (media.data, media.param, media.kind) == (data, "image", "image")
    assert media.digest == encoded(data, "image", "").digest


def test_a_digest_has_256_bits_and_covers_the_kind() -> None:
    image, video, other = (
        encoded(b"x", "image", "").digest,
        encoded(b"x", "video", "").digest,
        encoded(b"y", "image", "").digest,
    )
    assert len(image) == 32
    assert len({image, video, other}) == 3


def test_an_id_states_kind_and_digest() -> None:
    for media in (encoded(b"x", "image", ""), encoded(b"x", "video", "")):
        assert (kind_of(media.id), digest_of(media.id)) == (media.kind, media.digest)
    assert kind_of("https://img_") is None


def test_an_id_has_no_salt() -> None:
    """The worker finds the salt after as many bytes of the source as a digest has."""
    media = encoded(b"x", "image", "")
    (salted,) = salted_media({media.digest: media}, b"salt").values()
    assert salted.digest == media.digest + b"salt"
    assert salted.id == media.id
    assert len(media.digest) == DIGEST_BYTES == SOURCE_BYTES


@pytest.mark.parametrize("size", [100, 101])
def test_the_limit_counts_bytes_not_characters(size: int) -> None:
    url = f"data:;base64,{base64.b64encode(bytes(size)).decode()}"
    if size == 100:
        assert len(read(url)) == size
    else:
        with pytest.raises(InvalidMedia, match=r"^the file has 101 bytes, the limit is \S+ MiB \(max_media_mb\)$"):
            read(url)


@pytest.mark.parametrize("url", ["data:image/png,%00", "data:,", "data:", "data:text/html;base64,eA=="])
def test_data_of_another_form_or_type_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest):
        read(url)


@pytest.mark.parametrize("filler", ["", "YWJj" * (LARGE_URL // 4)], ids=["small", "large"])
@pytest.mark.parametrize("payload", ["a", "ab", "ab=", "a b=", "abc-", "YQ==YQ==", "YQ==\n", "é", "====", "YWJj===="])
def test_base64_is_decoded_strictly(payload: str, filler: str) -> None:
    with pytest.raises(InvalidMedia, match="not valid base64"):
        read(f"data:image/png;base64,{filler}{payload}", 2**20)


@pytest.mark.parametrize("filler", ["", "YWJj" * (LARGE_URL // 4)], ids=["small", "large"])
@pytest.mark.parametrize("payload", ["YQ==", "YWI=", "YWJj", "YWJj=", "YWJj=="])
def test_padding_may_be_superfluous(payload: str, filler: str) -> None:
    data = b"abc" * (len(filler) // 4) + base64.b64decode(payload)
    assert read(f"data:image/png;base64,{filler}{payload}", 2**20) == data


def test_data_may_not_be_empty() -> None:
    with pytest.raises(InvalidMedia, match="is empty"):
        read("data:image/png;base64,")
