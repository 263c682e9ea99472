"""The benchmarks as data: prompts, figures, and what is refused."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from evaluation.benchmarks import __main__ as command
from evaluation.benchmarks.__main__ import main
from evaluation.benchmarks.benchmark import SETS, UnknownBenchmark, load, names, parse
from evaluation.benchmarks.data import READERS
from evaluation.benchmarks.scoring import METRICS
from flamboyance_client.connection import transport_errors
from tests.evaluation.benchmarks.official_files import WRITERS

PAPER = 16  # benchmarks, to which ImageNet and Kinetics700 are added
BY_OPENFLAMINGO = {"coco", "flickr30k", "hateful_memes", "imagenet", "okvqa", "textvqa", "vizwiz", "vqav2"}


def test_each_benchmark_of_the_paper_is_a_file_with_a_reader_a_metric_and_fabricated_files() -> None:
    assert len(names()) == PAPER + 2
    for name in names():
        benchmark = load(name)
        assert benchmark.reader in READERS
        assert benchmark.metric in METRICS
        assert {benchmark.split, benchmark.support_split} - {None} <= benchmark.splits.keys()
        assert benchmark.shots == ((0,) if name == "rareact" else (0, 4, 8, 16, 32))
    assert names() == sorted(WRITERS)


def test_openflamingo_has_wordings_of_what_it_evaluates() -> None:
    assert {name for name in names() if load(name).prompts.openflamingo} == BY_OPENFLAMINGO
    assert load("vqav2").prompt("openflamingo").shot == "{media}Question:{question} Short answer:{answer}"
    assert load("vqav2").prompt("paper").shot == "{media}Question: {question} Answer: {answer}"
    memes = load("hateful_memes")
    assert memes.prompt("paper").shot == (
        '{media}is an image with written: "{question}" on it. Is it hateful? Answer: {label}'
    )
    assert memes.prompt("openflamingo").shot == (
        "{media}is an image with: '{question}' written on it. Is it hateful? Answer:{label}"
    )
    with pytest.raises(ValueError, match="STAR has no wording of OpenFlamingo"):
        load("star").prompt("openflamingo")


@pytest.mark.parametrize(
    ("name", "model", "shots", "figure"),
    [
        ("okvqa", "Flamingo-3B", 0, 41.2),
        ("rareact", "Flamingo-80B", 0, 60.8),
        ("hateful_memes", "Flamingo-9B", 32, 63.5),
        ("coco", "Flamingo-80B", 32, 113.8),
        ("vizwiz", "OpenFlamingo-9B", 16, 42.5),
        ("imagenet", "Flamingo-80B", 16, 66.4),
    ],
)
def test_the_published_figures_are_data(name: str, model: str, shots: int, figure: float) -> None:
    figures = [p.figures for p in load(name).published if p.model == model and p.selection == "random"]
    assert [f[shots] for f in figures] == [figure]


def test_a_prompt_without_room_has_no_published_figure() -> None:
    assert all(32 not in published.figures for published in load("visdial").published)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("task: rank", "task: rank\ncolour: red", "colour: Extra inputs are not permitted"),
        ("task: rank", "task: sing", "task: Input should be"),
        ("    zero_shot_examples: 0", "    zero_shot: 0", "prompts.paper.zero_shot"),
        ("metric: accuracy\n", "", "metric: Field required"),
    ],
)
def test_an_unknown_or_wrong_key_is_refused_by_name(old: str, new: str, message: str) -> None:
    text = (SETS / "star.yaml").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        parse("star", text.replace(old, new, 1))


def test_an_unknown_benchmark_is_refused_with_the_names() -> None:
    with pytest.raises(UnknownBenchmark, match=r"unknown benchmark 'clevr': the benchmarks are coco, .*, youcook2"):
        load("clevr")


def test_an_answer_is_cut_where_the_next_prompt_begins() -> None:
    assert load("coco").prompt("openflamingo").trim(' A "cat" Output:A dog') == "A cat"
    assert load("vqav2").prompt("openflamingo").trim("red, blue Question:") == "red"
    assert load("vqav2").prompt("paper").trim("red, blue Question:") == "red, blue"


def test_the_list_says_what_data_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    WRITERS["star"](tmp_path / "star")
    assert main(["--data", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(names())
    assert lines[lines.index("star           accuracy, val") + 1].strip() == "2 queries of val"
    assert sum("wants data" in line for line in lines) == len(names()) - 1
    assert all(load(name).title for name in names())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (BrokenPipeError(32, "Broken pipe"), ""),
        (
            httpx.ReadTimeout("timed out"),
            "error: no reply from the server in time: timed out. The server may be overloaded or hang; "
            "its log may show why.\n",
        ),
    ],
)
def test_an_error_is_explained_for_the_command_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Path | None) -> None:
        with transport_errors():
            raise error

    monkeypatch.setattr(command, "_print_list", fail)
    assert main([]) == 1
    assert capsys.readouterr().err == message
