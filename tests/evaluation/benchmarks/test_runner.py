"""Benchmarks from end to end: the command against a real server with a tiny model; runs that are killed continue."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from evaluation.benchmarks.__main__ import main
from evaluation.benchmarks.benchmark import Wording, load, names
from evaluation.benchmarks.runner import Options, Run, report_name
from flamboyance_client import Client, Query, Retries, Shot, Template
from tests.clients.serving import KEY, tiny_server
from tests.evaluation.benchmarks.official_files import WRITERS, write_image

ROOT = Path(__file__).resolve().parents[3]
IMAGE = Image.new("RGB", (8, 8), "red")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with tiny_server(tmp_path_factory.mktemp("server")) as url:
        yield url


def arguments(name: str, server: str, folder: Path, *more: str) -> list[str]:
    """Return the command's arguments for data in `folder`, with results in its folder `out`."""
    where = ["--data", str(folder / "data"), "--out", str(folder / "out")]
    return [name, "--server", server, "--api-key", KEY, *where, *more]


def evaluate(name: str, server: str, folder: Path, *more: str) -> dict[str, Any]:
    """Run the command, which must succeed, and return its report."""
    if not (folder / "data").exists():
        WRITERS[name](folder / "data")
    assert main(arguments(name, server, folder, *more)) == 0
    report: dict[str, Any] = json.loads(_report(folder / "out", name).read_text(encoding="utf-8"))
    return report


def _report(out: Path, name: str) -> Path:
    """Return the newest report of a benchmark."""
    reports = [path for path in out.glob(f"{name}*.json") if not path.name.endswith(".results.json")]
    return max(reports, key=lambda path: path.stat().st_mtime_ns)


def outcomes(folder: Path, shots: int) -> list[dict[str, Any]]:
    (path,) = (folder / "out").glob(f"*-{shots}-shots-*.jsonl")
    _, *lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", [name for name in names() if name not in ("nextqa", "imagenet")])
def test_a_benchmark_is_evaluated(name: str, server: str, tmp_path: Path) -> None:
    shots = ("0",) if name == "rareact" else ("0", "1")
    report = evaluate(name, server, tmp_path, "--shots", *shots)
    assert [result["shots"] for result in report["results"]] == list(map(int, shots))
    for result in report["results"]:
        assert result["answers"] == len(outcomes(tmp_path, result["shots"])) > 0
        assert result["failed"] == 0
        assert 0 <= result["value"] <= 1000
    assert report["model"] == "tiny-openflamingo"
    table = (tmp_path / "out" / f"{name}-tiny-openflamingo.md").read_text(encoding="utf-8")
    assert "| **tiny-openflamingo** |" in table
    assert "| Flamingo-3B |" in table or name == "kinetics700"


def test_the_categories_of_imagenet_are_ranked(server: str, tmp_path: Path) -> None:
    report = evaluate("imagenet", server, tmp_path, "--shots", "0", "--limit", "1", "--wording", "openflamingo")
    ((outcome),) = outcomes(tmp_path, 0)
    assert len(outcome["ranked"]) == 1
    assert report["results"][0]["value"] in (0.0, 100.0)


def test_wups_names_what_it_needs(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No query is sent before; nltk or its data are not among the packages of the tests."""
    WRITERS["nextqa"](tmp_path / "data")
    assert main(arguments("nextqa", server, tmp_path, "--shots", "1")) == 1
    assert "error: WUPS needs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


PROMPTS: list[tuple[str, Wording, str, str]] = [
    ("coco", "paper", "<image>Output: A.", "<image>Output:"),
    ("coco", "openflamingo", "<image>Output:A.", "\n<image>Output:"),
    ("okvqa", "paper", "<image>Question: Q? Answer: A.", "<image>Question: Q? Answer:"),
    ("okvqa", "openflamingo", "<image>Question:Q? Short answer:A.", "\n<image>Question:Q? Short answer:"),
    (
        *("hateful_memes", "paper", '<image>is an image with written: "Q?" on it. Is it hateful? Answer: A.'),
        '<image>is an image with written: "Q?" on it. Is it hateful? Answer:',
    ),
    (
        *("hateful_memes", "openflamingo", "<image>is an image with: 'Q?' written on it. Is it hateful? Answer:A."),
        "<image>is an image with: 'Q?' written on it. Is it hateful? Answer:",
    ),
    ("visdial", "paper", "<image>T Question: Q? Answer: A.", "<image>T Question: Q? Answer:"),
    ("rareact", "paper", "<image>Caption: a person A.", "<image>Caption: a person"),
    ("imagenet", "openflamingo", "<image>Output:A.", "<image>Output:"),
]


@pytest.mark.parametrize(("name", "wording", "shot", "query"), PROMPTS)
def test_the_server_writes_the_prompt(name: str, wording: Wording, shot: str, query: str, server: str) -> None:
    prompt = load(name).prompt(wording)
    texts: Query = {"image": IMAGE}
    texts |= {"question": "Q?"} if "{question}" in prompt.shot else {}
    texts |= {"text": "T"} if "{text}" in prompt.shot else {}
    example: Shot = {"label": "A."} if "{label}" in prompt.shot else {"answer": "A."}
    example |= texts  # type: ignore[typeddict-item]
    with Client(server, api_key=KEY) as client:
        template: Template = {"shot": prompt.shot, "separator": prompt.separator}
        reply = client.fewshot.complete(texts, shots=[example], template=template, echo=True, max_tokens=1)
    assert reply.fewshot["prompt"] == f"{shot}<|endofchunk|>{query}"


@pytest.mark.parametrize("selection", ["random", "rices"])
@pytest.mark.parametrize("wording", ["paper", "openflamingo"])
def test_the_shots_are_those_of_the_selection_and_wording(
    selection: str, wording: str, server: str, tmp_path: Path
) -> None:
    more = ("--selection", selection, "--wording", wording, "--ensemble")
    report = evaluate("hateful_memes", server, tmp_path, "--shots", "2", *more)
    published = {figures["selection"] for figures in report["published"]}
    assert published == {selection}
    assert (report["wording"], report["ensemble"]) == (wording, True)
    assert len({tuple(map(tuple, outcome["ranked"])) for outcome in outcomes(tmp_path, 2)}) > 1


def test_the_same_support_set_serves_all_runs(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    WRITERS["vizwiz"](tmp_path / "data")
    write_image(tmp_path / "data" / "train" / "VizWiz_train_00000000.jpg", 99)  # other data than the other tests'
    for shots in ("1", "2"):
        evaluate("vizwiz", server, tmp_path, "--shots", shots)
        assert re.search(r"VizWiz, examples .* 2/2 ", capsys.readouterr().err)
    with Client(server, api_key=KEY) as client:
        sets = [s for s in client.support_sets.list(limit=1000) if (s.name or "").startswith("benchmark-vizwiz-")]
    assert len({s.name for s in sets}) == len(sets)
    assert {(s.num_examples, s.version) for s in sets} == {(2, 2)}
    assert all(s.raw["expires_at"] for s in sets)


def test_a_split_without_answers_is_written_for_the_evaluation_server(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluate("vqav2", server, tmp_path, "--shots", "0", "--split", "test-dev")
    assert report["results"][0]["value"] is None
    assert "no public answers" in capsys.readouterr().out
    (path,) = (tmp_path / "out").glob("*.results.json")
    (row,) = json.loads(path.read_text(encoding="utf-8"))
    assert row.keys() == {"question_id", "answer"}
    assert row["question_id"] == 71


def test_probabilities_are_written_as_a_table_for_the_evaluation_server(server: str, tmp_path: Path) -> None:
    evaluate("hateful_memes", server, tmp_path, "--shots", "0")
    (path,) = (tmp_path / "out").glob("*.results.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = {int(row["id"]): (float(row["proba"]), int(row["label"])) for row in csv.DictReader(file)}
    answers = {int(outcome["id"]): dict(outcome["ranked"]) for outcome in outcomes(tmp_path, 0)}
    assert rows == {number: (p["yes"], int(p["yes"] > p["no"])) for number, p in answers.items()} != {}


def test_missing_videos_are_stated_in_the_result(server: str, tmp_path: Path) -> None:
    report = evaluate("msrvttqa", server, tmp_path, "--shots", "0")
    assert (report["results"][0]["answers"], report["results"][0]["missing"]) == (2, 1)
    table = (tmp_path / "out" / "msrvttqa-tiny-openflamingo.md").read_text(encoding="utf-8")
    assert "0 shots: 2 answers, 1 rows without their media file" in table


def test_a_query_that_the_server_refuses_is_stated_and_asked_again(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    WRITERS["coco"](tmp_path / "data")
    image = tmp_path / "data" / "val2014" / "COCO_val2014_000000000002.jpg"
    image.write_bytes(image.read_bytes()[:200])
    command = arguments("coco", server, tmp_path, "--shots", "0")
    assert main(command) == 1
    output, errors = capsys.readouterr()
    assert "1 answers, 1 failed and left out" in output
    assert "images, row 3: " in errors
    assert main(command) == 1
    assert len(outcomes(tmp_path, 0)) == 1


def test_a_run_of_refused_queries_ends_early(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITERS["vqav2"](tmp_path / "data")
    monkeypatch.setattr("evaluation.benchmarks.runner.MAX_FIRST_FAILURES", 2)
    for image in (tmp_path / "data" / "val2014").iterdir():
        image.write_bytes(image.read_bytes()[:200])
    assert main(arguments("vqav2", server, tmp_path, "--shots", "0", "--concurrency", "1")) == 1
    output, errors = capsys.readouterr()
    assert "0 answers, 3 failed and left out" in output
    assert errors.count("questions, row") == 2
    assert "0 shots: the first queries failed, 1 others were not asked" in errors


def test_a_key_that_is_needed_is_an_option_or_a_variable(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLAMBOYANCE_API_KEY", raising=False)
    WRITERS["coco"](tmp_path)
    command = ["coco", "--server", server, "--data", str(tmp_path), "--shots", "0", "--out"]
    assert main([*command, str(tmp_path / "none")]) == 1
    assert "pass --api-key or set FLAMBOYANCE_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("FLAMBOYANCE_API_KEY", "of another server")
    assert main([*command, str(tmp_path / "option"), "--api-key", KEY]) == 0
    monkeypatch.setenv("FLAMBOYANCE_API_KEY", KEY)
    assert main([*command, str(tmp_path / "variable")]) == 0
    with pytest.raises(SystemExit):
        main(["--help"])
    assert KEY not in capsys.readouterr().out


def test_a_killed_run_continues_and_has_the_results_of_a_whole_one(server: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        WRITERS["vqav2"](folder / "data")
    assert main(arguments("vqav2", server, whole, "--shots", "1")) == 0
    command = arguments("vqav2", server, killed, "--shots", "1", "--concurrency", "1")
    process = subprocess.Popen([sys.executable, "-m", "evaluation.benchmarks", *command], cwd=ROOT, env=environment())
    journal = wait_for_answer(killed / "out", process)
    process.kill()
    process.wait()
    answered = outcomes(killed, 1)
    assert len(answered) < 3
    with journal.open("a", encoding="utf-8") as file:
        file.write('{"id": "21", "te')  # as if the process was killed while it wrote
    assert main(command) == 0
    assert outcomes(killed, 1)[: len(answered)] == answered
    assert sorted(outcomes(killed, 1), key=str) == sorted(outcomes(whole, 1), key=str)
    # another run asks nothing
    before = journal.read_bytes()
    assert main(command) == 0
    assert journal.read_bytes() == before


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python" / "src")])}


def wait_for_answer(folder: Path, process: subprocess.Popen[bytes]) -> Path:
    """Wait until a journal has an answer, and return it."""
    while process.poll() is None:
        for path in folder.glob("*.jsonl"):
            if path.read_bytes().count(b"\n") >= 2:
                return path
        time.sleep(0.001)
    raise AssertionError("the command ended before it was killed")


def test_a_run_with_other_settings_has_another_file(server: str, tmp_path: Path) -> None:
    evaluate("flickr30k", server, tmp_path, "--shots", "1", "--seed", "0")
    evaluate("flickr30k", server, tmp_path, "--shots", "1", "--seed", "1")
    evaluate("flickr30k", server, tmp_path, "--shots", "1", "--seed", "1", "--limit", "1")
    assert len(list((tmp_path / "out").glob("flickr30k-1-shots-*.jsonl"))) == 3


def test_answers_without_shots_are_shared(server: str, tmp_path: Path) -> None:
    """The examples of the run with shots are no part of them."""
    for shots in (("0",), ("0", "1")):
        evaluate("imagenet", server, tmp_path, "--shots", *shots)
    assert len(list((tmp_path / "out").glob("imagenet-0-shots-*.jsonl"))) == 1


def test_a_report_has_the_name_of_its_settings(tmp_path: Path) -> None:
    coco = load("coco")
    options = Options(
        data=tmp_path,
        server="",
        api_key=None,
        out=tmp_path,
        shots=[0],
        selection="random",
        wording="paper",
        split=coco.split,
        support=None,
        limit=None,
        ensemble=False,
        seed=0,
        concurrency=1,
    )
    assert report_name(coco, options, "lite-1.5_b") == "coco-lite-1.5_b"
    assert report_name(coco, options, "org/lite").rpartition("-")[0] == "coco-org-lite"
    names = [report_name(coco, options, name) for name in ("a-b", "a/b", "a|b", "模型", "型", "\ud800", "m" * 250)]
    assert len({*names}) == 7
    assert max(map(len, names)) < 120
    other = replace(options, selection="rices", wording="openflamingo", split="val", support=9, limit=5, seed=1)
    assert report_name(coco, other, "lite") == "coco-lite-rices-openflamingo-val-support-9-limit-5-seed-1"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--shots", "x", "argument --shots: 'x' is not a whole number"),
        ("--limit", "1.5", "argument --limit: '1.5' is not a whole number"),
        ("--limit", "0", "argument --limit: 0 is less than 1"),
        ("--shots", "-1", "argument --shots: -1 is less than 0"),
    ],
)
def test_an_option_that_is_no_number_is_refused(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["coco", f"{option}={value}"])
    assert message in capsys.readouterr().err


def test_a_server_that_does_not_run_is_named_with_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.benchmarks.runner.RETRIES", Retries(limit=0))
    WRITERS["coco"](tmp_path / "data")
    assert main(arguments("coco", "http://127.0.0.1:9", tmp_path, "--shots", "0")) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: no connection to http://127.0.0.1:9: ")
    assert error.endswith("Start a server there, or pass the address of another one as --server.\n")


def test_a_set_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    WRITERS["msvdqa"](tmp_path / "msvdqa")
    (tmp_path / "msvdqa" / "youtube_mapping.txt").write_bytes(b"caf\xe9 vid5\n")
    assert main(["--data", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "youtube_mapping.txt: 'utf-8' codec" in output
    assert len(output.splitlines()) == 2 * len(names())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("clevr",), "error: unknown benchmark 'clevr'"),
        (("star",), "error: --data is required"),
        (("star", "--data", "nowhere"), "error: nowhere is not a folder"),
        (("--data", "nowhere"), "error: nowhere is not a folder"),
        (("coco", "--data", "."), "has no file dataset_coco.json"),
    ],
)
def test_an_error_is_one_line(
    more: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*more, "--server", "http://127.0.0.1:9"]) == 1
    output, error = capsys.readouterr()
    assert not output
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--shots", "3"), "error: 3 shots need as many examples, and there are 2"),
        (("--wording", "openflamingo"), "error: STAR has no wording of OpenFlamingo"),
        (("--split", "dev"), "error: STAR has the splits train, val, test, not 'dev'"),
    ],
)
def test_a_run_that_cannot_be_is_refused(
    more: tuple[str, ...], message: str, server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    WRITERS["star"](tmp_path / "data")
    assert main(arguments("star", server, tmp_path, *more)) == 1
    assert message in capsys.readouterr().err


def test_orders_of_written_answers_are_refused(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    WRITERS["coco"](tmp_path / "data")
    assert main(arguments("coco", server, tmp_path, "--shots", "1", "--ensemble")) == 1
    assert "error: --ensemble is for ranked candidates, and the answers of COCO are written" in capsys.readouterr().err


def test_results_that_have_no_folder_are_refused_before_examples_are_sent(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    WRITERS["coco"](tmp_path / "data")
    (tmp_path / "out").touch()
    monkeypatch.delattr(Run, "_register")
    assert main(arguments("coco", server, tmp_path, "--shots", "1")) == 1
    assert f"error: --out: the folder {tmp_path / 'out'} cannot be created: File exists" in capsys.readouterr().err
