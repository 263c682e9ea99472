"""Tests of the command line as its users run it, with a real server and a tiny model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flamboyance_client import Client, example
from flamboyance_client.cli import app as application
from flamboyance_client.cli import held_out
from flamboyance_client.errors import BadRequest, Refusal, Unavailable
from tests.clients.python.cli.commands import documents, process, run, words
from tests.clients.python.cli.conftest import COLOURS

ROOT = Path(__file__).resolve().parents[4]


class TestAsk:
    def test_the_answer_is_that_of_the_library(self, made: Client, folder: Path) -> None:
        image = folder / "red" / "23.png"
        (document,) = documents("ask", image, "What is this?", "--max-tokens", "4")
        assert process("ask", image, "What is this?", "--max-tokens", "4") == document["choices"][0]["text"] + "\n"
        assert document["usage"]["completion_tokens"] <= 4

    def test_shots_come_from_a_set(self, made: Client, folder: Path) -> None:
        image = folder / "red" / "23.png"
        colours = {colour: folder / colour / "23.png" for colour in COLOURS}
        examples = [example(file, colour, question="Which?", id=colour) for colour, file in colours.items()]
        made.support_sets.create(name="cli-questions", examples=examples)
        (document,) = documents("ask", image, "Which?", "-s", "cli-questions", "-k", "1", "--max-tokens", "2")
        assert [shot["id"] for shot in document["fewshot"]["shots"]] == ["red"]
        made.support_sets.delete("cli-questions")
        _, errors = run("ask", image, "Which?", "-s", "cli-colours", "-k", "1", status=1)
        assert "question" in errors

    def test_options_of_shots_need_a_set(self, folder: Path) -> None:
        for option, value in (("-k", "1"), ("--strategy", "first"), ("--shots-attend", "alone")):
            _, errors = run("ask", folder / "red" / "23.png", "Which?", option, value, status=2)
            assert f"{option}: it needs --support-set" in errors

    def test_a_set_of_a_folder_has_a_question(self, url: str, folder: Path) -> None:
        run("support-set", "create", folder, "--name", "cli-asked", "--question", "Which?")
        (document,) = documents("ask", folder / "red" / "23.png", "Which?", "-s", "cli-asked", "-k", "1")
        assert document["fewshot"]["shots"][0]["id"].startswith("red-23.png")
        run("support-set", "delete", "cli-asked")

    def test_a_question_without_an_image_is_a_wrong_command_line(self) -> None:
        _, errors = run("ask", "What is this?", status=2)
        assert errors == "error: Invalid value for IMAGE... QUESTION: give at least one image, and then the question\n"

    def test_a_question_before_its_image_is_a_wrong_command_line(self, folder: Path) -> None:
        file = next(folder.rglob("*.png"))
        _, errors = run("ask", "What is this?", file, status=2)
        assert "the question comes last" in errors


class TestClassify:
    def test_each_image_has_a_line(self, made: Client, folder: Path) -> None:
        image = folder / "red" / "23.png"
        red, *rest = documents("classify", image, folder, "-s", "cli-colours")
        assert [document["image"] for document in rest] == [str(path) for path in sorted(folder.rglob("*.png"))]
        assert red["image"] == str(image)
        assert red["probabilities"].keys() == set(COLOURS)
        assert red["confidence"] == max(red["probabilities"].values()) == red["probabilities"][red["label"]]
        table = words(process("classify", image, "-s", "cli-colours"))
        assert ["image", "label", "confidence", "next"] in table
        assert [str(image), red["label"], f"{red['confidence']:.2f}"] in [line[:3] for line in table]

    def test_a_method_is_requested(self, made: Client, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sent: list[dict[str, Any]] = []
        classify = Client.classify

        def recorded(client: Client, query: Any, **options: Any) -> Any:
            sent.append(options)
            return classify(client, query, **options)

        monkeypatch.setattr(Client, "classify", recorded)
        image = folder / "red" / "23.png"
        for method in ("nearest_mean", "knn", "linear"):
            (document,) = documents("classify", image, "-s", "cli-colours", "--method", method)
            assert document["method"] == method
            assert document["label"] == "red"
        (document,) = documents("classify", image, "-s", "cli-colours", "-k", "1", "--method", "in_context")
        assert document["method"] == "in_context"
        documents("classify", image, "-s", "cli-colours")
        plain = {"support_set": "cli-colours"}
        # the server selects the shots, as for `support-set test`
        assert [options["examples"] for options in sent] == [plain] * 3 + [plain | {"k": 1}, plain]
        arguments = ("classify", image, "-s", "cli-colours", "--method", "knn", "--strategy", "first")
        _, errors = run(*arguments, "--json", status=1)
        assert "examples.strategy: " in errors

    def test_an_image_that_is_not_sure_enough_has_no_label(self, made: Client, folder: Path, tmp_path: Path) -> None:
        for number, label in enumerate("abab"):
            file = tmp_path / "mixed" / label / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes((folder / COLOURS[number // 2] / "23.png").read_bytes())
        image = folder / COLOURS[0] / "23.png"
        arguments = ("classify", image, "-f", tmp_path / "mixed", "--method", "knn", "--target-accuracy", "0.99")
        (document,) = documents(*arguments)
        assert (document["label"], document["threshold"]) == (None, 1.0)
        assert "(no label)" in run(*arguments)[0]
        (document,) = documents("classify", image, "-s", "mixed", "--method", "knn", "--target-coverage", "0.5")
        assert 0 <= document["threshold"] < 1
        made.support_sets.delete("mixed")

    def test_a_recommendation_is_used(self, made: Client, folder: Path) -> None:
        evaluation = made.support_sets.evaluate("cli-colours", wait=True, methods=["knn"])
        image = folder / "red" / "23.png"
        (document,) = documents("classify", image, "--recommended", evaluation.id)
        assert document["method"] == "knn"
        replaced = (("-s", "a"), ("-k", "1"), ("--strategy", "first"), ("--method", "knn"), ("-f", folder))
        for arguments in replaced:
            _, errors = run("classify", image, "--recommended", evaluation.id, *arguments, status=2)
            assert errors == (
                "error: Invalid value for --recommended: "
                "it replaces --support-set, --folder, -k, --strategy and --method\n"
            )
        _, errors = run("classify", image, "--recommended", "eval_0", status=1)
        assert "404" in errors

    def test_a_folder_of_examples_becomes_a_set(self, made: Client, folder: Path) -> None:
        made.support_sets.delete("cli-colours")
        (document,) = documents("classify", folder / "blue" / "25.png", "--folder", folder)
        assert document["label"] in COLOURS
        assert made.support_sets.get("cli-colours").num_examples == 4

    def test_an_image_that_fails_leaves_the_others(self, made: Client, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot at all")
        images = (tmp_path / "broken.png", folder / "red" / "23.png")
        output, errors = run("classify", *images, "-s", "cli-colours", "--json", status=1)
        broken, red = map(json.loads, output.splitlines())
        assert "label" not in broken
        assert "image" in broken["error"]
        output, _ = run("classify", "nowhere.png", images[1], "-s", "cli-colours", status=1)
        assert "error: there is no file or folder 'nowhere.png'" in output
        assert red["label"] in COLOURS
        assert errors == "error: 1 of 2 images were not classified\n"

    def test_a_folder_without_images_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("cats")
        for arguments in ((), ("--json",)):
            _, errors = run("classify", tmp_path, "-s", "cli-colours", *arguments, status=1)
            assert errors == f"error: {tmp_path} has no images or videos\n"

    def test_the_advice_of_an_image_is_for_the_command_line(
        self, made: Client, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(client: Client, query: Any, **options: Any) -> Any:
            raise Unavailable(Refusal(message="loading", status=503, code="engine_not_ready", param="query"))

        monkeypatch.setattr(Client, "classify", refuse)
        output, _ = run("classify", folder / "red" / "23.png", "-s", "cli-colours", "--json", status=1)
        assert json.loads(output)["error"] == "503: loading (query)"

    def test_a_url_is_sent_as_it_is(self, made: Client) -> None:
        url = "http://host/a.png"
        output, _ = run("classify", url, "-s", "cli-colours", "--json", status=1)
        document = json.loads(output)
        assert (document["image"], "media_url_hosts" in document["error"]) == (url, True)
        _, errors = run("support-set", "suggest", "cli-colours", url, status=1)
        assert "media_url_hosts" in errors

    def test_examples_come_from_one_place(self, folder: Path) -> None:
        for arguments in ((), ("-s", "a", "-f", folder)):
            _, errors = run("classify", "a.png", *arguments, status=2)
            assert (
                errors
                == "error: Invalid value for --support-set: give one of --support-set, --folder and --recommended\n"
            )


class TestSupportSets:
    def test_a_set_is_created_and_shown_by_name(self, url: str, folder: Path) -> None:
        (created,) = documents("support-set", "create", folder, "--name", "created", "--pinned")
        assert (created["name"], created["num_examples"], created["pinned"]) == ("created", 4, True)
        (document,) = documents("support-set", "show", "created")
        assert (document["id"], document["label_counts"]) == (created["id"], {"blue": 2, "red": 2})
        output = process("support-set", "show", created["id"])
        assert ["name", "created"] in words(output)
        assert ["label", "red", "2"] in words(output)
        _, errors = run("support-set", "create", folder, "--name", "created", "--no-update", status=1)
        assert errors.startswith("error: 409: the name 'created' is taken")
        assert ["name", "created"] in words(process("support-set", "create", folder, "--name", "created"))
        (deleted,) = documents("support-set", "delete", "created")
        assert deleted == {"name": "created", "deleted": True}

    def test_what_gives_no_choice_is_noted(self, url: str, folder: Path, tmp_path: Path) -> None:
        single = tmp_path / "single"
        shutil.copytree(folder / "red", single / "red")
        (single / "empty").mkdir()
        for number in range(5):
            (single / "red" / f"{number}.txt").write_text("red")
        _, errors = run("support-set", "create", single, "--json")
        left_out = ", ".join(str(Path("red", f"{number}.txt")) for number in range(3))
        assert errors.splitlines() == [
            f"note: no images or videos, and so left out: {left_out} and 2 more",
            "note: without an image or a video, and so no labels: empty",
            "note: the set has one label, which is the answer to every classification",
        ]
        run("support-set", "delete", "single")

    def test_labels_that_are_alike_are_noted(self, url: str, folder: Path, tmp_path: Path) -> None:
        for label in ("Red", "red ", "blue", "dark red", "dark  red"):
            shutil.copytree(folder / "red", tmp_path / "my photos" / label)
        output, errors = run("support-set", "create", tmp_path / "my photos")
        similar = "'Red' and 'red ', 'dark  red' and 'dark red'"
        assert (
            errors.splitlines(keepends=True)[1] == f"note: labels that differ only in case or white space: {similar}\n"
        )
        assert ["name", "my-photos"] in words(output)
        run("support-set", "delete", "my-photos")

    def test_only_the_first_of_many_labels_are_shown(self, made: Client, folder: Path) -> None:
        picture = folder / "red" / "23.png"
        examples = [example(picture, label=f"{number:02}", id=str(number)) for number in range(23)]
        made.support_sets.create(name="cli-many", examples=examples)
        output, _ = run("support-set", "show", "cli-many")
        assert [line[1] for line in words(output) if line[0] == "label"] == [f"{number:02}" for number in range(20)]
        assert output.endswith("and 3 more labels, which --json shows\n")
        made.support_sets.delete("cli-many")

    def test_another_folder_of_the_same_name_needs_another(self, made: Client, tmp_path: Path) -> None:
        (tmp_path / "cli-colours" / "green").mkdir(parents=True)
        Image.new("RGB", (31, 7), "green").save(tmp_path / "cli-colours" / "green" / "1.png")
        _, errors = run("support-set", "create", tmp_path / "cli-colours", status=1)
        assert errors.endswith("another example): give another name with --name, or delete that set\n")
        _, errors = run("classify", "a.png", "--folder", tmp_path / "cli-colours", status=1)
        assert "another example): create a set with `support-set create --name NAME`, and give it as" in errors

    def test_sets_are_listed(self, made: Client) -> None:
        listed = documents("support-set", "list")
        assert [entry["id"] for entry in listed] == [entry.id for entry in made.support_sets.list(limit=1000)]
        output = process("support-set", "list")
        assert ["cli-colours", made.support_sets.get("cli-colours").id] in [line[:2] for line in words(output)]

    def test_all_pages_are_listed(self, made: Client, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        monkeypatch.setattr("flamboyance_client.cli.pages.PAGE", 1)
        second = made.support_sets.create()
        assert application.run(["support-set", "list", "--json"]) == 0
        assert second.id in capsys.readouterr().out
        made.support_sets.delete(second.id)

    def test_a_set_is_evaluated(self, made: Client) -> None:
        arguments = ("support-set", "evaluate", "cli-colours", "-k", "0", "-k", "1", "--strategy", "first")
        (evaluation,) = documents(*arguments)
        assert evaluation["status"] == "completed"
        assert {row["k"] for row in evaluation["summary"]} == {None, 0, 1}
        output, errors = run(*arguments, "--max-queries", "2")
        assert re.fullmatch(r"note: the evaluation eval_\w+ has \d+ queries, .*`--method.*\n", errors)
        assert "2 of 4 examples left out" in output
        rows = [line for line in words(output) if line[:1] == ["in_context,"] or line[:2] == ["knn", "all"]]
        names = [" ".join(row[: row.index("to") - 2]) for row in rows]
        assert names == ["knn all", "in_context, no shots 0", "in_context, first 1"]
        forms = ("--method", "in_context", "--shots-attend", "previous", "--shots-attend", "alone")
        (evaluation,) = documents("support-set", "evaluate", "cli-colours", "-k", "1", "--strategy", "first", *forms)
        assert [row["shots_attend"] for row in evaluation["summary"]] == ["previous", "alone"]

    def test_an_evaluation_has_the_methods_that_are_named(self, made: Client) -> None:
        arguments = ("support-set", "evaluate", "cli-colours", "--method", "knn", "--method", "nearest_mean")
        (evaluation,) = documents(*arguments)
        assert {row["method"] for row in evaluation["summary"]} == {"knn", "nearest_mean"}
        output, _ = run(*arguments)
        assert "flamboyance-client classify IMAGE... --recommended eval" in output

    def test_faults_of_a_set_are_named(self, made: Client, folder: Path) -> None:
        wrong = example(folder / "red" / "25.png", label="blue", id="wrong")
        made.support_sets.put("cli-colours", [wrong])
        (document,) = documents("support-set", "diagnose", "cli-colours", "--limit", "1")
        assert document["conflicting"]["count"] >= 1
        assert len(document["conflicting"]["data"]) == 1
        (document,) = documents("support-set", "diagnose", "cli-colours", "--version", "1")
        assert (document["version"], document["conflicting"]["count"]) == (1, 0)
        rows = words(process("support-set", "diagnose", "cli-colours"))
        assert ["mislabelled", "wrong", "blue", "looks", "like", "red"] in [row[:6] for row in rows]
        assert ["1", "mislabelled,"] in [row[:2] for row in rows]
        made.support_sets.delete("cli-colours")

    def test_images_to_label_are_suggested(self, made: Client, folder: Path, tmp_path: Path) -> None:
        for width in (41, 42):
            Image.new("RGB", (width, 7), "purple").save(tmp_path / f"{width}.png")
        arguments = ("support-set", "suggest", "cli-colours", tmp_path, folder / "red" / "23.png", "--count", "1")
        document, known = documents(*arguments)
        assert (known["image"], known["example"].partition(":")[0]) == (str(arguments[4]), "red-23.png")
        assert document["image"] in (str(tmp_path / "41.png"), str(tmp_path / "42.png"))
        assert document["reason"].keys() == {"margin", "similarity", "gain"}
        output = process(*arguments)
        assert [document["image"]] in [line[:1] for line in words(output)]
        assert "1 images are in the set already" in output

    def test_a_folder_tests_a_set(
        self, made: Client, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for label, colour, width in (("red", "red", 31), ("blue", "blue", 32), ("blue", "red", 33)):
            (tmp_path / label).mkdir(exist_ok=True)
            Image.new("RGB", (width, 7), colour).save(tmp_path / label / f"{width}.png")
        (tmp_path / "red" / "known.png").write_bytes((folder / "red" / "23.png").read_bytes())
        monkeypatch.setattr(held_out, "MAX_POOL_BYTES", 200)  # so that there are several pools
        arguments = ("support-set", "test", "cli-colours", tmp_path, "--method", "nearest_mean", "--method", "knn")
        nearest, neighbours = documents(*arguments)
        assert (nearest["method"], neighbours["method"]) == ("nearest_mean", "knn")
        assert (nearest["queries"], nearest["labelled"], nearest["correct"]) == (3, 3, 2)
        assert nearest["mistakes"] == [{"expected": "blue", "answered": "red", "count": 1}]
        assert nearest["examples_left_out"] == 1
        lowest, highest = nearest["accuracy_interval"]
        assert 0 < lowest < 2 / 3 < highest < 1
        output = process(*arguments)
        assert "3 images, without 1 that are examples of the set" in output
        rows = [" ".join(line) for line in words(output)]
        assert f"nearest_mean 0.667 {lowest:.3f} to {highest:.3f} 3" in rows
        assert f"knn 0.667 {lowest:.3f} to {highest:.3f} 3 as many correct" in rows
        assert "blue red 1" in rows

    def test_a_folder_that_cannot_test_a_set_is_an_error(self, made: Client, folder: Path, tmp_path: Path) -> None:
        _, errors = run("support-set", "test", "cli-colours", folder, status=1)
        assert errors == f"error: all images of {folder} are examples of the set: a test needs others\n"
        (tmp_path / "rde").mkdir()
        Image.new("RGB", (31, 7), "red").save(tmp_path / "rde" / "1.png")
        _, errors = run("support-set", "test", "cli-colours", tmp_path, status=1)
        assert errors == "error: no answer can have the labels rde; the possible ones are blue, red\n"
        (tmp_path / "rde").rename(tmp_path / "red")
        broken = tmp_path / "red" / "2.png"
        broken.write_bytes((tmp_path / "red" / "1.png").read_bytes()[:40])
        _, errors = run("support-set", "test", "cli-colours", tmp_path, status=1)
        assert errors.startswith(f"error: {broken}: ")
        _, errors = run("support-set", "test", "cli-colours", folder / "red", status=1)
        assert "have no labels" in errors

    def test_a_method_is_refused_before_another_has_run(
        self, made: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "red").mkdir()
        Image.new("RGB", (31, 7), "red").save(tmp_path / "red" / "1.png")
        monkeypatch.setattr(Client, "measure", None)
        classify = Client.classify

        def refuse(client: Client, query: Any, **options: Any) -> Any:
            if options["method"] == "linear":
                raise BadRequest(Refusal(message="method: linear is not possible", status=400, param="method"))
            return classify(client, query, **options)

        monkeypatch.setattr(Client, "classify", refuse)
        arguments = ("support-set", "test", "cli-colours", tmp_path, "--method", "nearest_mean", "--method", "linear")
        _, errors = run(*arguments, status=1)
        assert errors == "error: 400: method: linear is not possible\n"

    def test_an_export_overwrites_no_file_unless_it_is_forced(self, made: Client, tmp_path: Path) -> None:
        file = tmp_path / "cli-colours.zip"
        file.write_text("mine")
        for target in (file, tmp_path):
            _, errors = run("support-set", "export", "cli-colours", target, status=1)
            assert errors == f"error: {file} exists: give another file, or --force to overwrite it\n"
        assert file.read_text() == "mine"
        (saved,) = documents("support-set", "export", "cli-colours", tmp_path, "--force")
        assert saved == {"file": str(file), "bytes": file.stat().st_size}

    def test_a_set_is_exported_and_imported(self, made: Client, tmp_path: Path) -> None:
        (saved,) = documents("support-set", "export", "cli-colours", tmp_path)
        file = tmp_path / "cli-colours.zip"
        assert saved == {"file": str(file), "bytes": file.stat().st_size}
        output = process("support-set", "export", "cli-colours", tmp_path / "again.zip", "--version", "1")
        assert output == f"{tmp_path / 'again.zip'} ({file.stat().st_size:,} bytes)\n"
        (copy,) = documents("support-set", "import", file, "--name", "imported")
        assert (copy["name"], copy["num_examples"], copy["version"]) == ("imported", 4, 1)
        _, errors = run("support-set", "import", file, status=1)
        hint = "give another name with --name, or delete that set, or keep it with --exist-ok"
        assert errors == f"error: 409: the name 'cli-colours' is taken by another support set: {hint}\n"
        _, errors = run("support-set", "import", file, "--name", "", status=1)
        assert errors.startswith("error: ")
        assert "name" in errors
        (existing,) = documents("support-set", "import", file, "--exist-ok")
        assert existing["id"] == made.support_sets.get("cli-colours").id
        assert process("support-set", "delete", "imported") == "imported deleted\n"
        assert ["name", "imported"] in words(process("support-set", "import", file, "--name", "imported"))
        run("support-set", "delete", "imported", "--yes")

    def test_a_set_that_does_not_exist_is_an_error(self) -> None:
        for command in (("show",), ("evaluate",), ("diagnose",), ("export",), ("delete",)):
            _, errors = run("support-set", *command, "nothing", status=1)
            assert errors == "error: 404: no support set 'nothing'\n"

    def test_a_set_is_warmed(self, made: Client) -> None:
        (document,) = documents("support-set", "warm", "cli-colours")
        assert document["status"] in ("warming", "ready")
