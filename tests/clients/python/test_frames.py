"""Tests that the rows of a data frame become examples, with fakes that have the columns of pandas and polars."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flamboyance_client.frames import Columns, labelled_rows
from flamboyance_client.labelled import LabelledMedia, with_ids


class Frame:
    """A data frame: `columns` is an iterable of names, and a column is an iterable of values."""

    def __init__(self, **columns: Any) -> None:
        self._columns = columns

    @property
    def columns(self) -> Any:
        return iter(self._columns)

    def __getitem__(self, column: str) -> Any:
        return iter(self._columns[column])


COLUMNS = Columns(image="path", label="label", answer=None, question=None)


def rows(frame: Frame, columns: Columns = COLUMNS, root: str | Path = "") -> list[LabelledMedia]:
    return labelled_rows(frame, columns, root)


def test_relative_paths_are_relative_to_the_root(tmp_path: Path) -> None:
    paths = ["a/1.png", Path("2.png"), "/data/3.png", "https://host/4.png", "data:image/png;base64,aaaa", "img_5"]
    items = rows(Frame(path=paths, label=["a"] * 6), root=tmp_path)
    assert [item.media for item in items] == [
        tmp_path / "a" / "1.png",
        tmp_path / "2.png",
        Path("/data/3.png"),
        *paths[3:],
    ]
    assert [item.file for item in items] == ["a/1.png", "2.png", "/data/3.png", "", "", ""]


def test_a_file_whose_name_begins_like_an_id_is_a_path(tmp_path: Path) -> None:
    (item,) = rows(Frame(path=["img_1.png"], label=["a"]), root=tmp_path)
    assert (item.media, item.file) == (tmp_path / "img_1.png", "img_1.png")


def test_images_in_the_cells_are_sent() -> None:
    pixels = np.zeros((2, 3, 3), np.uint8)
    items = with_ids(rows(Frame(path=[Image.new("RGB", (3, 2)), pixels, b"GIF89a"], label=["a", "b", "c"])))
    assert all(str(item.example()["image"]).startswith("data:image/") for item in items)
    assert len({item.id for item in items}) == 3


def test_texts_come_from_the_named_columns() -> None:
    columns = Columns(image="path", label=None, answer="text", question="q")
    (item,) = rows(Frame(path=["img_1"], text=["Two cats."], q=["What?"], label=["cat"]), columns)
    assert item.example() == {"image": "img_1", "answer": "Two cats.", "question": "What?"}


def test_labels_are_in_one_unicode_form_and_other_texts_as_they_are() -> None:
    columns = Columns(image="path", label="label", answer="text", question=None)
    decomposed = "cafe\u0301"
    first, second = rows(
        Frame(path=["img_1", "img_2"], label=["caf\u00e9", decomposed], text=[decomposed] * 2), columns
    )
    assert first.label == second.label == "caf\u00e9"
    assert second.answer == decomposed


def test_a_whole_number_is_a_label() -> None:
    items = rows(Frame(path=["img_1", "img_2"], label=[7, np.int64(8)]))
    assert [item.label for item in items] == ["7", "8"]


@pytest.mark.parametrize("label", [None, "", float("nan"), 1.5, True, ["a"]], ids=repr)
def test_another_label_is_refused_with_its_row(label: Any) -> None:
    with pytest.raises(ValueError, match=r"row 1, column 'label': expected a text or a whole number, got"):
        rows(Frame(path=["img_1", "img_2"], label=["a", label]))


@pytest.mark.parametrize("cell", [None, float("nan"), 3], ids=repr)
def test_another_image_is_refused_with_its_row(cell: Any) -> None:
    with pytest.raises(TypeError, match="row 1: an image or video must be a path"):
        with_ids(rows(Frame(path=["img_1", cell], label=["a", "b"])))


def test_a_cell_without_a_path_is_refused_with_its_row() -> None:
    with pytest.raises(ValueError, match="row 1, column 'path': expected a path, a URL or an image, got ''"):
        rows(Frame(path=["img_1", ""], label=["a", "b"]))


def test_a_missing_column_is_refused_with_the_columns_that_exist() -> None:
    with pytest.raises(ValueError, match="no column 'path'; its columns are 'image', 'label'"):
        rows(Frame(image=[], label=[]))
    with pytest.raises(ValueError, match="no rows"):
        rows(Frame(path=[], label=[]))


def test_a_column_whose_name_another_has_is_refused() -> None:
    class Joined(Frame):
        @property
        def columns(self) -> Any:
            return iter(["path", "label", "label"])

    with pytest.raises(ValueError, match="2 columns 'label': give each another name"):
        rows(Joined(path=["img_1"], label=["a"]))


@pytest.mark.parametrize("labels", [["a"], ["a", "b", "c"]])
def test_a_column_of_another_length_is_refused(labels: list[str]) -> None:
    message = f"the column 'label' has {len(labels)} values, and the column 'path' has 2"
    with pytest.raises(ValueError, match=message):
        rows(Frame(path=["img_1", "img_2"], label=labels))


def test_ids_depend_on_the_content_alone_and_equal_rows_are_numbered() -> None:
    def ids(paths: list[str], labels: list[str]) -> list[str | None]:
        return [item.id for item in with_ids(rows(Frame(path=paths, label=labels)))]

    first, second, third = ids(["img_1", "img_2", "img_1"], ["a", "b", "a"])
    assert third == f"{first}.2"
    assert ids(["img_2", "img_1"], ["b", "a"]) == [second, first]
    assert ids(["img_1"], ["b"]) != [first]


def test_a_path_is_part_of_an_id(tmp_path: Path) -> None:
    (tmp_path / "my pictures").mkdir()
    (tmp_path / "my pictures" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (item,) = with_ids(rows(Frame(path=["my pictures/1.png"], label=["a"]), root=tmp_path))
    assert item.id is not None
    assert item.id.startswith("my-pictures-1.png:")


def test_accents_are_left_out_of_an_id(tmp_path: Path) -> None:
    for name in ("Blüte/Größe.png", "Blu\u0308te/Größe.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n")
        (item,) = with_ids(rows(Frame(path=[name], label=["a"]), root=tmp_path))
        assert (item.id or "").startswith("Blute-Grosse.png:")


def test_optional_packages_are_not_imported() -> None:
    code = "import sys, flamboyance_client; print({'numpy', 'pandas', 'polars', 'PIL'} & sys.modules.keys())"
    path = Path(__file__).resolve().parents[3] / "clients" / "python" / "src"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=path)
    assert done.stdout.strip() == "set()"
