"""Archives from anywhere: each is read as it was meant, or refused with the place at fault, within bounded memory."""

from __future__ import annotations

import errno
import io
import json
import random
import struct
import tempfile
import tracemalloc
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from server.errors import BodyTooLarge, InvalidArchive, InvalidMedia, ServerError, TooManyExamples
from server.media.source import encoded
from server.media.store import MediaStore
from server.schemas.separators import MAX_SEPARATORS, WORDS
from server.settings import Settings
from server.store import archive_reader
from server.store.archive_reader import Archive
from server.store.archive_writer import write_archive
from server.store.examples import Examples
from server.store.records import Example, SupportSet
from tests.server.archives import archive, reference
from tests.server.conftest import png

LIMITS = Settings(max_import_mb=1, max_body_mb=1 / 16, max_media_mb=1 / 8, max_set_examples=5)
RED = png("red")
EXAMPLE = {"id": "a", "text": "t", "media": [reference(RED)]}
FILES = {"media/a.png": RED}

DEEP = b'{"metadata": ' + b'{"a":' * 3000 + b"1" + b"}" * 3001


def opened(data: bytes, limits: Settings = LIMITS) -> Archive:
    return Archive(io.BytesIO(data), limits)


def refused(data: bytes, limits: Settings = LIMITS, error: type[ServerError] = InvalidArchive) -> tuple[str, Any]:
    """Return the message and the parameter with which reading an archive and its media is refused."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        with pytest.raises(error) as caught:
            read_all(file, limits)
    return caught.value.message, caught.value.param


def read_all(file: BinaryIO, limits: Settings = LIMITS) -> Archive:
    """Read an archive and its media. A real file refuses other calls than bytes in memory, and with other errors."""
    opened_archive = Archive(file, limits)
    for item, param in opened_archive.media.items():
        assert opened_archive.read_media(item, param).data
    return opened_archive


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_written_by_hand_is_read(compression: int) -> None:
    clip = reference(b"clip", "media/clip-1.mp4", "video")
    examples: list[dict[str, Any]] = [
        {"label": "cat", "media": [clip, reference(RED)], "metadata": {"x": 1}},
        {"id": "b", "text": "t"},
    ]
    files = {**FILES, "media/clip-1.mp4": b"clip", "media/": b""}
    read = opened(archive(examples, files, compression, metadata={"owner": "me"}))
    assert (read.manifest.name, read.manifest.metadata) == ("s", {"owner": "me"})
    first, second = read.examples
    assert (first.id, first.label, first.text, first.metadata) == (None, "cat", "", {"x": 1})
    assert (second.id, second.text, second.media) == ("b", "t", [])
    media = [read.read_media(item, param) for item, param in read.media.items()]
    assert [(item.kind, item.data, item.param) for item in media] == [
        ("video", b"clip", "examples[0].media[0]"),
        ("image", RED, "examples[0].media[1]"),
    ]
    assert media[1].digest == encoded(RED, "image", "").digest
    assert not media[1].is_in_memory


def test_a_written_archive_is_read(tmp_path: Any) -> None:
    store = MediaStore(str(tmp_path))
    red, blue = store.put(RED, "image"), store.put(png("blue"), "image")
    examples = (Example("a", (red, blue, red), "t", "l", "?", '{"x": 1}'), Example("b", (blue,)))
    support_set = SupportSet(id="ss_1", name="s", version=3, examples=Examples(examples))
    read = read_all(io.BytesIO(b"".join(write_archive(support_set, {"owner": "me"}, store))))
    ids = {item: read.read_media(item, param).id for item, param in read.media.items()}
    again = tuple(
        Example(e.id or "", tuple(ids[item] for item in e.media), e.text, e.label, e.question, json.dumps(e.metadata))
        for e in read.examples
    )
    assert again == examples
    assert (read.manifest.name, read.manifest.metadata) == ("s", {"owner": "me"})


@pytest.mark.parametrize("metadata", [{"a": {"b": {"c": [1] * 5400}}}, {"a": [[1]] * 3200}])
def test_a_written_archive_is_read_whatever_its_metadata(metadata: dict[str, Any], tmp_path: Path) -> None:
    """Metadata of many small values are longer if they are indented."""
    support_set = SupportSet(id="ss_1", name="s", version=1, examples=Examples((Example("a", (), "t", "l"),)))
    written = b"".join(write_archive(support_set, metadata, MediaStore(str(tmp_path))))
    assert read_all(io.BytesIO(written)).manifest.metadata == metadata


def test_a_null_name_is_none() -> None:
    assert opened(archive([], name=None)).manifest.name is None


@pytest.mark.parametrize(
    ("examples", "files", "manifest", "message", "param"),
    [
        ([], {}, {"format": "zip"}, 'manifest.json: format is "zip", expected "flamboyance.support_set"', "format"),
        ([], {}, {"format_version": 2}, "format_version is 2, this server reads 1", "format_version"),
        ([], {}, {"format_version": None}, "format_version is null", "format_version"),
        ([], {}, {"format_version": 2, "new": 1}, "format_version is 2", "format_version"),
        ([], {}, {"colour": 1}, "manifest.json: unknown parameter colour", "colour"),
        ([], {}, {"name": "ss_1"}, "a name may not begin with ss_", "name"),
        ([], {}, {"num_examples": 1}, "num_examples is 1, and the archive has 0", "num_examples"),
        ([EXAMPLE], FILES, {"num_media": 2}, "num_media is 2, and the archive has 1", "num_media"),
        ([], {"manifest.json": b"["}, {}, "manifest.json is not a JSON object", None),
        ([], {"manifest.json": DEEP}, {}, "manifest.json has too many lists and objects in each other", None),
        ([], {"examples.jsonl": b"{}\n"}, {}, "examples.jsonl, line 1", "examples[0]"),
        ([{"text": "t"}], {"examples.jsonl": b'{"text": "t"}\n{'}, {}, "line 2: not JSON", "examples[1]"),
        ([{"text": "t"}, {"text": 1}], {}, {}, "line 2: text:", "examples[1].text"),
        ([{"text": "t", "colour": 1}], {}, {}, "line 1: unknown parameter colour", "examples[0].colour"),
        ([{"id": "a", "text": "t"}] * 2, {}, {}, "line 2: an earlier example has the same id 'a'", "examples[1].id"),
        ([EXAMPLE], {}, {}, "the archive has no file media/a.png", "examples[0].media[0]"),
        ([{"text": "t"}], FILES, {}, "a file 'media/a.png', which no example shows", None),
        ([], {"../../etc/passwd": b"x"}, {}, "a file '../../etc/passwd', which no example shows", None),
        ([], {"media/../manifest.json": b"x"}, {}, "which no example shows", None),
        ([EXAMPLE], {"media/a.png": png("blue")}, {}, "SHA-256 of the file differs", "examples[0].media[0]"),
    ],
)
def test_the_fault_is_named(
    examples: list[dict[str, Any]], files: dict[str, bytes], manifest: dict[str, Any], message: str, param: str | None
) -> None:
    actual, actual_param = refused(archive(examples, files, **manifest))
    assert message in actual
    assert actual_param == param


@pytest.mark.parametrize(
    "file", ["../a.png", "/etc/passwd", "media/../../a", "media/a/b.png", "media/.hidden", "media\\a.png", "a.png"]
)
def test_a_media_file_is_in_the_folder_for_media(file: str) -> None:
    example = {"text": "t", "media": [reference(RED, file)]}
    message, param = refused(archive([example], {file: RED}))
    assert "named media/NAME" in message
    assert param == "examples[0].media[0].file"


@pytest.mark.parametrize("name", ["manifest.json", "examples.jsonl"])
def test_a_zip_file_without_the_two_files_is_refused(name: str) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as output:
        output.writestr({"manifest.json": "examples.jsonl", "examples.jsonl": "manifest.json"}[name], b"{}")
    assert f"has no file {name}: it is not an exported support set" in refused(file.getvalue())[0]


def test_two_files_of_one_name_are_refused() -> None:
    file = io.BytesIO(archive([]))
    with zipfile.ZipFile(file, "a") as output, pytest.warns(UserWarning, match="Duplicate"):
        output.writestr("manifest.json", b"{}")
    assert "two files of the archive have the same name" in refused(file.getvalue())[0]


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(compression: int) -> None:
    assert "another method than deflate" in refused(archive([], compression=compression))[0]


def test_an_encrypted_file_is_refused() -> None:
    data = bytearray(archive([]))
    data[data.index(b"PK\1\2") + 8] |= 1
    assert "is encrypted" in refused(bytes(data))[0]


@pytest.mark.parametrize("data", [b"", b"not a ZIP file", b"PK\5\6" + bytes(17), archive([])[:-30], archive([])[50:]])
def test_what_is_no_zip_file_is_refused(data: bytes) -> None:
    assert "not a ZIP archive" in refused(data)[0]


@pytest.mark.parametrize("num_bytes", [1, 2**31])
def test_an_offset_outside_of_the_file_is_refused(num_bytes: int) -> None:
    """The end of a ZIP file states where its directory begins, which moves the offsets of all entries."""
    data = bytearray(archive([]))
    (offset,) = struct.unpack("<L", data[-6:-2])
    data[-6:-2] = struct.pack("<L", offset + num_bytes)
    assert "an offset is outside of it" in refused(bytes(data))[0]


def test_a_disk_that_fails_is_no_fault_of_the_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    read = opened(archive([EXAMPLE], FILES))
    monkeypatch.setattr(zipfile.ZipExtFile, "read", fail)
    with pytest.raises(OSError, match="Input/output error"):
        read.read_media(*next(iter(read.media.items())))


class TestLimits:
    def test_of_examples(self) -> None:
        assert len(opened(archive([{"text": "t"}] * 5)).examples) == 5
        message, param = refused(archive([{"text": "t"}] * 6), error=TooManyExamples)
        assert ("more than 5 examples" in message, param) == (True, "examples")

    def test_of_a_media_item(self) -> None:
        for size, is_small in ((2**17, True), (2**17 + 1, False)):
            data = archive([{"media": [reference(bytes(size))]}], {"media/a.png": bytes(size)}, zipfile.ZIP_DEFLATED)
            if is_small:
                read_all(io.BytesIO(data))
            else:
                message, param = refused(data, error=InvalidMedia)
                assert ("limit is 0.125 MiB (max_media_mb)" in message, param) == (True, "examples[0].media[0]")

    def test_of_an_empty_media_item(self) -> None:
        data = archive([{"media": [reference(b"")]}], {"media/a.png": b""})
        assert refused(data, error=InvalidMedia) == ("the media's data is empty", "examples[0].media[0]")

    def test_of_texts(self) -> None:
        message, _ = refused(archive([{"text": "t" * 20_000}] * 4, compression=zipfile.ZIP_DEFLATED))
        assert "examples.jsonl has 80" in message
        assert "the limit is 65536" in message

    def test_of_the_manifest(self) -> None:
        assert "the limit is 262144" in refused(archive([], {"manifest.json": b" " * 2**18 + b"{}"}))[0]

    def test_of_a_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(archive_reader, "MAX_LINE_BYTES", 100)
        message, param = refused(archive([{"text": "t"}, {"text": "t" * 100}]))
        assert ("line 2: it has more than 100 bytes" in message, param) == (True, "examples[1]")

    @pytest.mark.parametrize("separator", MAX_SEPARATORS)
    def test_of_separators_is_one_for_all_lines(self, separator: bytes) -> None:
        limits = LIMITS.model_copy(update={"max_import_mb": 8, "max_body_mb": 4, "max_set_examples": 200})
        number = {b",": 2**12, b":": 2**10}.get(separator, 2**11)
        keys = dict.fromkeys(map(str, range(number)), 1)
        values = {b",": [1] * (number + 2), b":": keys, b"[": [[]] * number, b"{": [{}] * number}[separator]
        example = {"text": separator.decode() * 2**13, "metadata": {"a": values}}  # those in a text do not count
        num_examples = MAX_SEPARATORS[separator] // number
        assert len(opened(archive([example] * (num_examples - 1)), limits).examples) == num_examples - 1
        message, _ = refused(archive([example] * num_examples), limits, error=BodyTooLarge)
        limit = MAX_SEPARATORS[separator]
        assert message == f"examples.jsonl has more than {limit} {WORDS[separator]}"

    def test_of_separators_lets_a_full_set_through(self) -> None:
        settings = Settings()
        example = {"label": "l", "question": "a: b", "text": "a, b", "metadata": {"x": [1, 2], "y": {}}}
        examples = [{**example, "media": [reference(RED)]}] * settings.max_set_examples
        assert opened(archive(examples, FILES), settings).examples

    def test_of_everything_unpacked(self) -> None:
        files = {f"media/{index}": bytes(2**17) for index in range(9)}
        examples = [{"media": [reference(bytes(2**17), file) for file in files]}]
        data = archive(examples, files, zipfile.ZIP_DEFLATED)
        assert len(data) < 2**14
        assert "bytes unpacked, the limit is 1048576" in refused(data)[0]

    def test_of_the_directory(self) -> None:
        """The end of a ZIP file states the size of its directory, which zipfile reads at once."""
        size = archive_reader.MAX_DIRECTORY_BYTES + 46
        entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", *[0] * 16)
        directory = entry * (size // len(entry))
        data = directory + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, len(directory), 0, 0)
        tracemalloc.start()
        try:
            assert "its directory is too large" in refused(data)[0]
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 2 * len(data)

    def test_a_stated_size_that_is_too_small_does_not_let_more_through(self) -> None:
        """A bomb states fewer bytes than it unpacks to."""
        files = {"media/a.png": bytes(2**22)}
        data = bytearray(archive([{"media": [reference(bytes(2**22))]}], files, zipfile.ZIP_DEFLATED))
        stated = struct.pack("<L", 2**22)
        data = data.replace(stated, struct.pack("<L", 10))
        tracemalloc.start()
        try:
            refused(bytes(data))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 2**21


def test_damaged_archives_are_refused_or_read_and_nothing_else() -> None:
    """Bytes that change in any place never raise what a client would see as an internal error."""
    generator = random.Random(0)
    whole = {compression: archive([EXAMPLE], FILES, compression) for compression in (0, zipfile.ZIP_DEFLATED)}
    num_refused = 0
    for _ in range(1500):
        data = bytearray(whole[generator.choice((0, zipfile.ZIP_DEFLATED))])
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.choice((0, 1, 0x7F, 0xFF, generator.randrange(256)))
        if generator.random() < 0.2:
            del data[generator.randrange(len(data)) :]
        num_refused += 1
        with tempfile.TemporaryFile() as file, suppress(ServerError):
            file.write(data)
            read_all(file)
            num_refused -= 1
    assert 1000 < num_refused < 1500
