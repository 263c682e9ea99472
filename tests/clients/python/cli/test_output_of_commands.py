"""Tests of what commands print while they run, and where the output cannot have every character."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flamboyance_client import Client, NotConnected, TransportError, example
from flamboyance_client.cli.ask import without_last_space
from tests.clients.python.cli.commands import PACKAGE, documents, process, run, words
from tests.clients.serving import KEY

ROOT = Path(__file__).resolve().parents[4]


def test_images_have_lines_though_the_server_ends_in_the_middle(
    made: Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classify, images = Client.classify, sorted(folder.rglob("*.png"))

    def end(client: Client, query: Any, **options: Any) -> Any:
        if query == images[-1]:
            raise NotConnected("refused")
        return classify(client, query, **options)

    monkeypatch.setattr(Client, "classify", end)
    output, errors = run("classify", folder, "-s", "cli-colours", "--json", status=1)
    assert ["error" in json.loads(line) for line in output.splitlines()] == [*[False] * 3, True]
    assert errors == "error: 1 of 4 images were not classified\n"


def test_an_option_that_cannot_be_sent_is_one_error(made: Client, folder: Path) -> None:
    output, errors = run("classify", folder, "-s", "cli-colours", "--target-accuracy", "nan", "--json", status=1)
    assert (output, errors.count("\n")) == ("", 1)
    assert "target_accuracy" in errors


def test_a_test_that_fails_prints_the_methods_before(
    made: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "red").mkdir()
    for width in (31, 33):
        Image.new("RGB", (width, 7), "red").save(tmp_path / "red" / f"{width}.png")
    classify = Client.classify

    def fail(client: Client, query: Any, **options: Any) -> Any:
        if options["method"] == "knn" and query == tmp_path / "red" / "33.png":
            raise TransportError("lost")
        return classify(client, query, **options)

    monkeypatch.setattr(Client, "classify", fail)
    arguments = ("support-set", "test", "cli-colours", tmp_path, "--method", "nearest_mean", "--method", "knn")
    output, errors = run(*arguments, status=1)
    assert [line[0] for line in words(output) if line[0] in ("nearest_mean", "knn")] == ["nearest_mean"]
    assert errors.startswith("error: 1 of 2 queries failed; the first is ")
    output, _ = run(*arguments, "--json", status=1)
    assert [json.loads(line)["method"] for line in output.splitlines()] == ["nearest_mean"]
    assert run(*arguments[:5], "knn", status=1)[0] == ""


@pytest.mark.parametrize("module", ["flamboyance_client", "flamboyance"])
def test_a_label_that_the_output_cannot_have_is_escaped(
    made: Client, folder: Path, tmp_path: Path, module: str
) -> None:
    picture = tmp_path / "\udcff.png"
    shutil.copy(folder / "red" / "23.png", picture)
    made.support_sets.create(name="cats", examples=[example(picture, label="猫", id="1")], exist_ok=True)
    path = os.pathsep.join(map(str, (PACKAGE / "src", ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "cp1252"}
    command: list[str | Path] = [sys.executable, "-m", module, "classify", picture, "-s", "cats", "--method", "knn"]
    outputs = [
        subprocess.run([*command, *more], env=environment, capture_output=True, timeout=120, check=True).stdout
        for more in ([], ["--json"])
    ]
    assert b"\\u732b" in outputs[0]
    document = json.loads(outputs[1])
    assert (document["image"], document["label"]) == (str(picture), "猫")


def test_white_space_at_the_end_of_an_answer_is_left_out() -> None:
    assert list(without_last_space([" a", "\n", "\n\n", "b ", "c", "\n", "", "\n"])) == [" a", "\n\n\nb", " c"]


def test_a_set_whose_folder_has_no_change_is_unchanged(made: Client, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "Übungen")
    _, errors = run("support-set", "create", tmp_path / "Übungen")
    assert errors == f"note: the set of {tmp_path / 'Übungen'} has the name Ubungen\n"
    arguments = ("support-set", "create", tmp_path / "Übungen", "--name", "Ubungen")
    assert run(*arguments)[0].endswith("The examples are unchanged.\n")
    (tmp_path / "Übungen" / "red" / "23.png").unlink()
    assert "unchanged" not in run(*arguments)[0]
    run("support-set", "delete", "Ubungen")


def test_removed_examples_are_counted(url: str, folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    run("support-set", "create", copied)
    (copied / "red" / "23.png").unlink()
    removed = "note: examples removed, which an earlier upload wrote and whose files are gone: 1\n"
    assert run("support-set", "create", copied)[1] == removed
    assert run("support-set", "create", copied)[1] == ""
    (copied / "blue" / "23.png").unlink()
    assert run("classify", folder / "red" / "23.png", "--folder", copied)[1] == removed
    run("support-set", "delete", "copied")


def test_a_set_of_texts_is_tested_by_its_texts(url: str, folder: Path, tmp_path: Path) -> None:
    for colour in ("red", "blue"):
        (tmp_path / colour).mkdir()
        Image.new("RGB", (31, 7), colour).save(tmp_path / colour / "31.png")
    examples = [example(file, file.parent.name) for file in folder.rglob("*.png")]
    with Client(url, api_key=KEY) as client:
        client.support_sets.create(name="texts", examples=examples)
    (document,) = documents("support-set", "test", "texts", tmp_path, "--method", "nearest_mean")
    assert (document["queries"], document["correct"]) == (2, 2)
    (tmp_path / "red").rename(tmp_path / "rde")
    _, errors = run("support-set", "test", "texts", tmp_path, status=1)
    assert errors.startswith("error: no answer can have the labels rde; the possible ones are ")
    run("support-set", "delete", "texts")


def test_a_damaged_file_of_a_folder_does_not_end_the_command(made: Client, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "red", tmp_path / "red")
    (tmp_path / "red" / "broken.jpg").write_bytes(b"x")
    arguments = ("classify", tmp_path / "red", "-s", "cli-colours", "--json")
    output, errors = run(*arguments, status=1)
    outcomes = {Path(document["image"]).name: document for document in map(json.loads, output.splitlines())}
    assert "error" in outcomes.pop("broken.jpg")
    assert all(outcome["label"] for outcome in outcomes.values())
    assert len(outcomes) == len(list((folder / "red").iterdir()))
    assert "1 of" in errors
    _, errors = run("support-set", "suggest", "cli-colours", tmp_path / "red", status=1)
    assert "broken.jpg (an unknown format) cannot be read" in errors


def test_unreadable_files_are_left_out_of_a_set_and_named(made: Client, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "colours")
    broken = tmp_path / "colours" / "red" / "broken.png"
    broken.write_bytes((folder / "red" / "23.png").read_bytes()[:50])
    arguments = ("support-set", "create", tmp_path / "colours", "--name", "cli-readable")
    _, errors = run(*arguments, status=1)
    assert " ".join(errors.split()) == (
        f"error: 400: {broken}: examples[4].image: image cannot be decoded: its data are damaged, or end early: "
        "--skip-unreadable leaves such files out"
    )
    output, errors = run(*arguments, "--skip-unreadable", "--json")
    assert json.loads(output)["num_examples"] == len(list(folder.glob("*/*.png")))
    assert f"note: left out: {broken} (image cannot be decoded: " in " ".join(errors.split())
    assert [file["path"] for file in json.loads(output)["skipped"]] == [str(broken)]
    assert "so no labels" not in errors
    shutil.copytree(folder / "red", tmp_path / "colours" / "rouge\u0301")
    for number, file in enumerate((tmp_path / "colours" / "rouge\u0301").iterdir()):
        file.write_bytes(broken.read_bytes() if number else b"no image")
    _, errors = run(*arguments, "--skip-unreadable")
    assert "note: all of their files were left out, and so no labels: rougé" in " ".join(errors.split())
    _, errors = run("classify", folder / "red" / "23.png", "--folder", tmp_path / "colours", status=1)
    assert "create the set with `support-set create --skip-unreadable`" in " ".join(errors.split())
    broken.write_text("no image")
    _, errors = run(*arguments, status=1)
    assert "(an unknown format) cannot be read" in errors
    assert "--skip-unreadable leaves such files out" in errors
    run("support-set", "delete", "cli-readable")


def test_an_export_that_cannot_be_written_asks_for_another_file(
    made: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> Path:
        raise PermissionError(13, "Permission denied", ".")

    monkeypatch.setattr("flamboyance_client.resources.SupportSets.export", refuse)
    _, errors = run("support-set", "export", "cli-colours", tmp_path / "set.zip", status=1)
    expected = f"error: {tmp_path / 'set.zip'} cannot be written (Permission denied): give another FILE"
    assert " ".join(errors.split()) == expected


def test_labels_are_shown_as_they_are(made: Client, folder: Path) -> None:
    labels = ("[unknown]", "[/b]", ":cat:")
    picture = folder / "red" / "23.png"
    examples = [example(picture, label=label, id=str(number)) for number, label in enumerate(labels)]
    made.support_sets.create(name="cli-labels", examples=examples)
    lines = words(process("support-set", "show", "cli-labels"))
    assert [line[1] for line in lines if line[0] == "label"] == list(labels)
    answers = process("classify", picture, "-s", "cli-labels", "--method", "nearest_mean")
    assert all(label in answers for label in labels)
    made.support_sets.delete("cli-labels")


def test_options_that_select_shots_are_noted_where_no_method_uses_shots(made: Client, folder: Path) -> None:
    arguments = ("classify", folder / "red" / "23.png", "-s", "cli-colours", "-k", "2", "--json")
    for method, expected in (("in_context", False), ("auto", True)):
        output, errors = run(*arguments, "--method", method)
        assert (json.loads(output)["method"] not in ("in_context", "blend")) == expected
        assert ("so -k had no effect; --method in_context uses shots" in errors) == expected


def test_a_file_that_is_no_exported_set(made: Client, tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_text("no archive")
    _, errors = run("support-set", "import", tmp_path / "set.zip", status=1)
    expected = f"{tmp_path / 'set.zip'} must be a file that `support-set export` has written"
    assert " ".join(errors.split()).endswith(expected)
