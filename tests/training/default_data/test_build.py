"""Tests of building images from toy packages: rendered icons, labelled clip art, and photographs without drawings."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from PIL import Image

from training.default_data import build as build_module
from training.default_data.build import build
from training.default_data.concepts import Concepts
from training.default_data.features import open_features
from training.default_data.packages import PackageError, fetch, unpack_debian
from training.default_data.readers import SIZE, num_colours, read
from training.default_data.records import read_records, write_records
from training.default_data.sources import EMOJIBASE, SOURCES, Source

BY_NAME = {source.name: source for source in SOURCES}
ICON = '<rect width="16" height="16" fill="#f00"/>'


def package(file: Path, entries: dict[str, object]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:gz") as archive:
        for name, content in entries.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file


def emoji(label: str, code: str, group: int, subgroup: int) -> dict[str, object]:
    return {"label": label, "hexcode": code, "group": group, "subgroup": subgroup, "tags": ["pet", "é", "ab"]}


@pytest.fixture
def emojibase(tmp_path: Path) -> Path:
    return package(
        tmp_path / "packages" / "emojibase-data-17.0.0.tgz",
        {
            "en/data.json": [emoji("dog face", "1F436", 3, 34), emoji("flag: Peru", "1F1F5", 9, 98), {"label": "x"}],
            "meta/groups.json": {
                "groups": {"3": "animals-nature", "9": "flags"},
                "subgroups": {"34": "animal-mammal", "98": "country-flag"},
            },
            "meta/unicode-names.json": {"1F436": "DOG FACE"},
        },
    )


def test_icons_are_rendered_under_their_concepts_name(tmp_path: Path, emojibase: Path) -> None:
    icons = {"width": 16, "icons": {"dog-face": {"body": ICON}, "flag-for-peru": {"body": ICON}, "odd": {"body": ICON}}}
    file = package(tmp_path / "noto.tgz", {"icons.json": icons})
    ((image, record),) = read(BY_NAME["noto"], file, tmp_path, Concepts(emojibase))
    assert (record.label, record.category, record.tags) == ("dog face", "animal mammal", ("pet",))
    assert record.image == "images/noto/dogface.webp"
    assert image.size == (SIZE, SIZE)
    assert image.convert("RGB").getpixel((100, 100)) == (255, 0, 0)


def test_webp_images_are_found_by_code(tmp_path: Path, emojibase: Path) -> None:
    webp = io.BytesIO()
    Image.new("RGBA", (4, 4)).save(webp, "WEBP")
    file = package(tmp_path / "3d.tgz", {"assets/1f436-fe0f.webp": webp.getvalue(), "assets/0031.webp": b""})
    assert [record.label for _, record in read(BY_NAME["fluent-3d"], file, tmp_path, Concepts(emojibase))] == [
        "dog face"
    ]


def write_photograph(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)).save(file)


def test_clip_art_is_labelled_by_the_prefix_of_its_file_name(tmp_path: Path, emojibase: Path) -> None:
    root = tmp_path / "unpacked" / "usr" / "share" / "openclipart" / "png"
    for name in ("dog_face_a_painter_01", "gufo_architetto_01"):
        write_photograph(root / "animals" / "mammals" / f"{name}.png")
    (root / "animals" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    records = [r for _, r in read(BY_NAME["openclipart"], tmp_path, tmp_path / "unpacked", Concepts(emojibase))]
    assert [(record.label, record.category) for record in records] == [
        ("dog face", "animals mammals"),
        ("", "animals mammals"),
    ]


def test_only_photographs_are_read_from_stamps(tmp_path: Path, emojibase: Path) -> None:
    root = tmp_path / "unpacked" / "usr" / "share" / "tuxpaint" / "stamps"
    write_photograph(root / "animals" / "birds" / "owl.png")
    (root / "animals" / "birds" / "owl.txt").write_text("An owl.\nde=Eine Eule\n")
    write_photograph(root / "animals" / "birds" / "cartoon" / "crow.png")
    write_photograph(root / "symbols" / "music" / "clef.png")
    Image.new("RGB", (50, 50), "red").save(root / "animals" / "birds" / "flat.png")
    ((_, record),) = read(BY_NAME["tuxpaint"], tmp_path, tmp_path / "unpacked", Concepts(emojibase))
    assert (record.label, record.category, record.domain, record.trains) == ("owl", "birds", "photograph", False)


def test_colours_are_counted() -> None:
    assert num_colours(Image.new("RGB", (30, 30), "red")) == 1


def test_a_build_writes_records_images_and_a_card_and_is_not_repeated(
    tmp_path: Path, emojibase: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "SOURCES", (BY_NAME["noto"],))
    file = package(
        tmp_path / "packages" / "iconify-json-noto-1.2.9.tgz", {"icons.json": {"icons": {"dog-face": {"body": ICON}}}}
    )
    records = build(tmp_path)
    assert read_records(tmp_path) == records
    assert records[0].digest == hashlib.sha256((tmp_path / records[0].image).read_bytes()).hexdigest()
    with Image.open(tmp_path / records[0].image) as image:
        assert image.size == (SIZE, SIZE)
    assert "| noto | @iconify-json/noto (npm) | 1.2.9 | Apache-2.0 |" in (tmp_path / "DATA_CARD.md").read_text()
    file.write_bytes(b"")
    assert build(tmp_path) == records


def test_a_package_that_cannot_be_fetched_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "404 not found")

    monkeypatch.setattr(subprocess, "run", fails)
    source: Source = replace(EMOJIBASE, version="0.0.0")
    with pytest.raises(PackageError, match=r"npm pack .*emojibase-data@0\.0\.0 for emojibase failed: 404"):
        fetch(source, tmp_path)


def killed(command: list[str], **options: object) -> NoReturn:
    """Write the beginning of what the command would write, as if this process were killed then."""
    folder = Path(str(options.get("cwd", command[-1])))
    (folder / "emojibase-data-17.0.0.tgz").write_bytes(b"the beg")
    raise KeyboardInterrupt


def test_a_killed_run_leaves_no_part_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        fetch(EMOJIBASE, tmp_path / "packages")
    with pytest.raises(KeyboardInterrupt):
        unpack_debian(tmp_path / "package.deb", tmp_path / "unpacked" / "openclipart")
    assert not list((tmp_path / "packages").iterdir())
    assert not list((tmp_path / "unpacked").iterdir())


def test_a_run_that_is_killed_while_it_writes_records_leaves_no_file_of_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(file: Path, text: str, **options: str) -> NoReturn:
        file.write_bytes(text[:9].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises(KeyboardInterrupt):
        write_records(tmp_path, [])
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path)


def test_no_training_source_has_a_share_alike_or_gpl_licence() -> None:
    assert {source.licence for source in SOURCES if source.trains} <= {
        "Apache-2.0",
        "MIT",
        "CC-BY-4.0",
        "public domain",
    }


def test_a_source_without_images_is_read_as_such(tmp_path: Path) -> None:
    write_records(tmp_path, [])
    assert read_records(tmp_path) == []


def test_a_folder_without_features_is_an_error_that_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"npy does not exist: .* python -m training.default_data"):
        open_features(tmp_path, [])


def test_a_folder_that_was_not_built_is_an_error_that_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data.jsonl does not exist: .*python -m training.default_data"):
        read_records(tmp_path)
