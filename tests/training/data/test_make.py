"""Tests of the command that builds shards from a folder or a JSONL file, whose shards the training stream reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from flamboyance_client import folders
from model import heif
from tests.tiny_models import VISION, prompt_tokenizer
from tests.training.toy import COLOURS, png
from training.config import SetConfig
from training.data.make import SourceError, TargetError, from_folder, from_jsonl, main, write_shards
from training.data.records import IMAGES, VIDEOS
from training.data.shards import RawRecord, read_shard
from training.data.stream import ShardStream, find_shards

ROOT = Path(__file__).resolve().parents[3]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "training.data.make", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_folder_of_images_with_texts(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    for i, (name, colour) in enumerate(COLOURS.items()):
        file = (source / "deep" if i % 2 else source) / f"{name}.png"
        file.write_bytes(png(colour))
        file.with_suffix(".txt").write_text(name)
    (source / "unnamed.png").write_bytes(png((1, 2, 3)))
    (source / "notes.md").write_text("these are colours")
    finished = make(str(source), "--out", str(tmp_path / "shards"), "--per-shard", "3")
    assert finished.returncode == 0
    assert finished.stdout.splitlines() == [
        f"4 records in {tmp_path / 'shards'}",
        f"2 files are in no record, such as {source / 'notes.md'}",
    ]
    shards = sorted((tmp_path / "shards").iterdir())
    assert [shard.name for shard in shards] == ["000000.tar", "000001.tar"]
    texts = {record.files["txt"].decode() for shard in shards for record in read_shard(shard)}
    assert texts == set(COLOURS)


def test_a_jsonl_of_documents_is_read_back_unchanged(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(COLOURS["red"]))
    lines = tmp_path / "source.jsonl"
    lines.write_text(json.dumps({"texts": ["see", None, "red"], "images": [None, "a.png", None]}) + "\n")
    assert make(str(lines), "--out", str(tmp_path / "shards")).returncode == 0
    config = SetConfig(name="d", kind="documents", shards=str(tmp_path / "shards/*.tar"))
    prepared = ShardStream(find_shards(config.shards), config, prompt_tokenizer(), VISION, seed=0).take()
    assert prompt_tokenizer().decode(prepared.tokens.token_ids, skip_special_tokens=False) == (
        "see<|endofchunk|><image>red<|endofchunk|></s>"
    )
    assert len(prepared.media) == 1


def test_an_invalid_line_is_named_in_the_error(tmp_path: Path) -> None:
    lines = tmp_path / "source.jsonl"
    lines.write_text('{"image": "absent.png", "text": "x"}\n')
    finished = make(str(lines), "--out", str(tmp_path / "shards"))
    assert finished.returncode == 1
    assert finished.stderr == f"error: {lines}, line 1: there is no file {tmp_path / 'absent.png'}\n"


def test_a_missing_image_of_a_document_is_named(tmp_path: Path) -> None:
    lines = tmp_path / "pages.jsonl"
    lines.write_text('{"images": ["kite.png", null], "texts": [null, "a kite"]}\n')
    with pytest.raises(SourceError, match=r"pages\.jsonl, line 1: there is no file .*kite\.png$"):
        write_shards(from_jsonl(lines), tmp_path / "shards", 1)


def test_a_source_that_is_absent_is_named(tmp_path: Path) -> None:
    finished = make(str(tmp_path / "absent.jsonl"), "--out", str(tmp_path / "shards"))
    assert (finished.returncode, finished.stderr) == (1, f"error: there is no file {tmp_path / 'absent.jsonl'}\n")


def test_help_lists_the_sources_in_lines_of_their_own() -> None:
    lines = make("--help").stdout.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("a ")] == ["a folder", "a JSONL"]


def test_a_text_that_is_no_string_is_an_error_in_one_line(tmp_path: Path) -> None:
    lines = tmp_path / "source.jsonl"
    (tmp_path / "a.png").write_bytes(png(COLOURS["red"]))
    lines.write_text('{"image": "a.png", "text": null}\n')
    finished = make(str(lines), "--out", str(tmp_path / "shards"))
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: ")
    assert "source.jsonl, line 1" in line
    assert "text is None, must be a string" in line


def test_a_text_and_an_image_at_one_index_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(COLOURS["red"]))
    lines = tmp_path / "source.jsonl"
    lines.write_text('{"texts": [null, "red"], "images": ["a.png", "a.png"]}\n')
    with pytest.raises(SourceError, match=r"line 1 .* texts\[1\] and images\[1\] are both set, one must be null"):
        write_shards(from_jsonl(lines), tmp_path / "shards", 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            b'{"img": "a.png", "text": "red"}',
            "it needs either image or video, or texts and images; its fields are img, text",
        ),
        (b'{"image": "a.png", "video": "b.mp4", "text": "red"}', "it needs either image or video"),
        (b'{"image": "a.png", "text": "  "}', "text is '  ', must be a string with words"),
        (b'{"image": "a.png"}', "text is None, must be a string with words"),
        (
            b'{"image": "a.png", "text": "red", "Text": ""}',
            "it has the unknown field Text, must have only image and text",
        ),
        (
            b'{"texts": ["red"], "images": [null], "weight": 2}',
            "it has the unknown field weight, must have only texts and images",
        ),
        (b'{"image": "a.txt", "text": "red"}', "image is 'a.txt', must be one of the formats jpg, "),
        (b'{"video": "a.png", "text": "red"}', "video is 'a.png', must be one of the formats mp4, "),
        (b'{"image": ["a.png"], "text": "red"}', r"image is \['a.png'\], must be the path of a file"),
        (b"[1]", r"it is \[1\], must be an object"),
        (b'{"image": "a.png", "text": "\xe9"}', "'utf-8' codec can't decode byte 0xe9"),
        (b"[" * 100_000, "maximum recursion depth"),
    ],
)
def test_a_line_that_no_set_would_read_is_refused(line: bytes, message: str, tmp_path: Path) -> None:
    for name in ("a.png", "a.txt"):
        (tmp_path / name).write_bytes(png(COLOURS["red"]))
    lines = tmp_path / "source.jsonl"
    lines.write_bytes(b'{"image": "a.png", "text": "red"}\n' + line)
    with pytest.raises(SourceError, match=rf"source\.jsonl, line 2 is not a valid record: {message}"):
        list(from_jsonl(lines))


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(COLOURS["red"]))
    lines = tmp_path / "source.jsonl"
    lines.write_text('{"image": "a.png", "text": "red"}\r\n\n{"image": "a.png", "text": "red"}\n\n', "utf-8-sig")
    assert [record.files["txt"] for record in from_jsonl(lines)] == [b"red", b"red"]


def test_an_image_of_a_document_that_is_a_url_stays_one(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"A")
    lines = tmp_path / "source.jsonl"
    url = "HTTPS://example.com/a.png"
    document = {"texts": [None, "unseen", None, "red"], "images": [url, None, "a.png", None]}
    lines.write_text(json.dumps(document))
    (record,) = from_jsonl(lines)
    assert record.files.keys() == {"json", "2.png"}
    assert json.loads(record.files["json"])["images"] == [url, None, "2.png", None]


@pytest.mark.parametrize(("text", "message"), [(b" \n", "has no text"), (b"\xe9", "is not UTF-8")])
def test_a_text_of_a_folder_without_words_is_named(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(COLOURS["red"]))
    (tmp_path / "a.txt").write_bytes(text)
    with pytest.raises(SourceError, match=rf"a\.txt {message}"):
        list(from_folder(tmp_path))


@pytest.mark.parametrize("number", ["0", "-3", "x"])
def test_a_shard_has_at_least_one_record(
    number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["make", str(tmp_path), "--out", str(tmp_path), f"--per-shard={number}"])
    with pytest.raises(SystemExit):
        main()
    assert f"argument --per-shard: '{number}' is not a positive whole number" in capsys.readouterr().err


def test_a_folder_with_shards_is_refused(tmp_path: Path) -> None:
    records = [RawRecord(str(n), {"txt": b"old"}) for n in range(4)]
    write_shards(records, tmp_path, 2)
    with pytest.raises(
        TargetError, match=r"has 2 \.tar files, such as 000000\.tar: remove them or name another folder"
    ):
        write_shards(records[:1], tmp_path, 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["000000.tar", "000001.tar"]


def test_shards_below_the_source_are_not_called_files_without_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(png(COLOURS["red"]))
    (tmp_path / "a.txt").write_text("red")
    monkeypatch.setattr(sys, "argv", ["make", str(tmp_path), "--out", str(tmp_path / "shards")])
    main()
    assert capsys.readouterr().out == f"1 records in {tmp_path / 'shards'}\n"


def test_a_source_without_records_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source.jsonl").write_text("\n\n")
    for name in ("source", "source.jsonl"):
        monkeypatch.setattr(sys, "argv", ["make", str(tmp_path / name), "--out", str(tmp_path / "shards")])
        with pytest.raises(SystemExit, match=rf"^error: \S+/{name} has no record"):
            main()


def test_an_error_leaves_no_shards(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(COLOURS["red"]))
    lines = tmp_path / "source.jsonl"
    lines.write_text('{"image": "a.png", "text": "red"}\n' * 3 + "{\n")
    with pytest.raises(SourceError, match="line 4"):
        write_shards(from_jsonl(lines), tmp_path / "shards", 2)
    assert not list((tmp_path / "shards").iterdir())
    lines.write_text('{"image": "a.png", "text": "red"}\n')
    assert write_shards(from_jsonl(lines), tmp_path / "shards", 2) == 1


def test_the_extensions_are_those_of_the_clients_folders() -> None:
    assert {f".{extension}" for extension in IMAGES} == set(folders.IMAGE_SUFFIXES)
    assert {f".{extension}" for extension in VIDEOS} == set(folders.VIDEO_SUFFIXES)


@pytest.mark.parametrize("extension", ["heic", "heif", "hif"])
def test_heic_is_read(tmp_path: Path, extension: str) -> None:
    heif.register()
    (tmp_path / "in").mkdir()
    Image.new("RGB", (64, 64), COLOURS["red"]).save(tmp_path / f"in/a.{extension}", heif.FORMAT)
    (tmp_path / "in/a.txt").write_text("red")
    assert write_shards(from_folder(tmp_path / "in"), tmp_path / "shards", 1) == 1
    config = SetConfig(name="p", kind="pairs", shards=str(tmp_path / "shards/*.tar"))
    prepared = ShardStream(find_shards(config.shards), config, prompt_tokenizer(), VISION, seed=0).take()
    (pixels,) = prepared.media.values()
    torch.testing.assert_close(pixels.mean(dim=(0, 2, 3)), torch.tensor([1.0, -1, -1]), atol=0.05, rtol=0)
