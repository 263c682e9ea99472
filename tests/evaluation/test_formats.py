"""Tests of the table of what the formats of weights change, with a tiny model of each lineage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluation.formats import BASE, NAMES, ON_CPU, PAGES, TEXT, load, main, measure
from evaluation.naming import perplexity
from model.folder import save_folder
from model.prompt import PromptTokenizer
from tests.tiny_models import CONFIGS, FAMILIES, Family, byte_tokenizer, tiny_model, widened

NUM_TOKENS = 40


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        config = widened(CONFIGS[family])
        save_folder(root / family, config, tiny_model(config).state_dict().items(), byte_tokenizer().to_str())
    return {family: root / family for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_format_is_compared_with_bfloat16(family: Family, folders: dict[Family, Path]) -> None:
    rows = {(row.passage, row.name): row for row in measure(folders[family], NAMES, NUM_TOKENS)}
    assert {name for passage, name in rows if passage == "text"} == {*NAMES} - {PAGES}
    assert {name for passage, name in rows if passage == "text after a picture"} == {*NAMES}
    for (_, name), row in rows.items():
        changes = (row.mean_difference, row.largest_difference, row.divergence, 1 - row.same_token)
        if name == BASE:
            assert changes == pytest.approx((0, 0, 0, 0), abs=1e-6)
        else:
            assert row.largest_difference >= row.mean_difference > 0
            assert row.divergence > 0
    by_size = sorted((row.gib, name) for (passage, name), row in rows.items() if passage == "text")
    assert [name for _, name in by_size] == ["int4", ON_CPU, "fp8", "int8", "bfloat16", "float32"]


def test_fewer_bits_change_more(folders: dict[Family, Path]) -> None:
    rows = {row.name: row for row in measure(folders["idefics"], NAMES, NUM_TOKENS) if row.passage == "text"}
    assert rows["float32"].divergence < rows["int8"].divergence < rows["fp8"].divergence < rows["int4"].divergence


def test_the_perplexity_is_that_of_the_default_models_evaluation(folders: dict[Family, Path]) -> None:
    row = next(iter(measure(folders["flamingo"], [BASE], NUM_TOKENS)))
    tokenizer = PromptTokenizer.load(folders["flamingo"], CONFIGS["flamingo"].prompt)
    ids = tokenizer.encode_plain(TEXT.read_text())[:NUM_TOKENS]
    assert row.perplexity == pytest.approx(perplexity(load(folders["flamingo"], BASE), ids))


def test_the_command_prints_a_table_per_model_and_json(
    folders: dict[Family, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    families: tuple[Family, ...] = ("openflamingo", "idefics")
    main([*(str(folders[family]) for family in families), "--formats", "int8", PAGES, "--tokens", "12"])
    *tables, last = capsys.readouterr().out.strip().split("\n\n")
    assert tables[::2] == [str(folders[family]) for family in families]
    for printed in tables[1::2]:
        head, _, *lines = printed.splitlines()
        assert head.startswith("| passage | format | GiB | perplexity |")
        cells = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in lines]
        assert cells == [
            ("text", BASE),
            ("text", "int8"),
            ("text after a picture", BASE),
            ("text after a picture", "int8"),
            ("text after a picture", PAGES),
        ]
    results = json.loads(last)
    assert results.keys() == {str(folders[family]) for family in families}
    assert [row["name"] for row in results[str(folders["idefics"])]] == [BASE, BASE, "int8", "int8", PAGES]


def test_models_of_one_name_have_results_of_their_own(
    folders: dict[Family, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (str(tmp_path / name / "model") for name in "ab")
    links: dict[str, Family] = {first: "openflamingo", second: "idefics"}
    for link, family in links.items():
        Path(link).parent.mkdir()
        Path(link).symlink_to(folders[family])
    monkeypatch.chdir(folders["idefics"])
    main([first, second, ".", "--formats", BASE, "--tokens", "3"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results.keys() == {first, second, "."}
    assert results["."] == results[second] != results[first]


def test_a_text_needs_two_tokens(folders: dict[Family, Path], capsys: pytest.CaptureFixture[str]) -> None:
    call = [str(folders["flamingo"]), "--formats", BASE, "--tokens"]
    with pytest.raises(SystemExit, match="2"):
        main([*call, "1"])
    assert "argument --tokens: 1 is less than 2" in capsys.readouterr().err
    main([*call, "2"])
