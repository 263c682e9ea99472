"""The ablations' files, what they learn from and are asked, and the command from data to table on toy sizes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.checkpoint.native import load_folder, save_folder
from model.config import ConfigError
from tests.tiny_models import CONFIGS, byte_tokenizer, prompt_tokenizer, tiny_model
from tests.training.default.data import make_folder
from training.ablations import ablation
from training.ablations.__main__ import measure, parse
from training.ablations.ablation import BASE, Paper, names, read_ablation
from training.ablations.data import SHOTS, Captions, Kinds, Sequences, asked, queries
from training.ablations.score import score
from training.ablations.small import make_small
from training.ablations.table import Result, table
from training.default.catalogue import Catalogue, row_of
from training.default_data.split import held_out_image

NAMES = [
    "all-previous",
    "from-scratch",
    "interval-2",
    "interval-4",
    "mlp",
    "no-gates",
    "no-interleaved",
    "round-robin",
    "transformer",
    "unfrozen",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def kinds(data: Path) -> Kinds:
    return Kinds(Catalogue(data))


def test_there_is_a_file_for_each_and_each_changes_one_thing() -> None:
    assert names() == [BASE, *NAMES]
    base = read_ablation(BASE).config
    changed = {
        name: {f for f in base.__slots__ if getattr(read_ablation(name).config, f) != getattr(base, f)}
        for name in NAMES
    }
    assert changed.pop("unfrozen") == {"trains"}
    assert changed.pop("from-scratch") == {"trains", "language_model"}
    assert changed.pop("no-interleaved") == {"sets"}
    assert changed.pop("round-robin") == {"accumulate"}
    assert set(map(tuple, changed.values())) == {("ablate",)}


def test_what_the_paper_lost() -> None:
    assert read_ablation("no-gates").paper == Paper(overall=64.0, base=68.4)
    assert all(paper.change < 0 for name in NAMES if (paper := read_ablation(name).paper))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("says: x\nruns: {}", "odd.yaml: unknown key runs"),
        ("says: x\nrun: {ablate: {gate: shut}}", "config.ablate.gate: 'shut' is none of"),
        ("says: x\nwithout: [pages]", "odd.yaml: the base has no set pages"),
        ("says: x\npaper: {overall: 1.0}", "odd.yaml: paper: missing key base"),
    ],
)
def test_a_file_that_says_nothing_possible_is_refused(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base.yaml").write_text((ablation.FOLDER / "base.yaml").read_text())
    (tmp_path / "odd.yaml").write_text(text)
    monkeypatch.setattr(ablation, "FOLDER", tmp_path)
    with pytest.raises(ConfigError, match=message):
        read_ablation("odd")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="'no-lunch' is no ablation: there are base, all-previous"):
        read_ablation("no-lunch")


def test_queries_show_what_no_run_was_trained_on(kinds: Kinds) -> None:
    tokenizer = prompt_tokenizer()
    trained = {row for rows in kinds.trained.values() for row in rows}
    records = kinds.catalogue.records
    for make in (Sequences(kinds, tokenizer, 0), Captions(kinds, tokenizer, 0)):
        for number in range(30):
            assert {row_of(media) for media in make(number).media} <= trained
    found = queries(kinds, 3 * len(kinds.names), seed=1)
    assert set(Counter(query.kind for query in found).values()) == {3}
    for query in found:
        assert query.row not in trained
        assert held_out_image(records[query.row].image)
        assert records[query.row].category == query.kind
        assert len({name for _, name in query.shots}) == SHOTS


def test_only_the_answer_is_scored(kinds: Kinds) -> None:
    (query,) = queries(kinds, 1, seed=0)
    example = asked(query, "fruit")
    assert example.answers == frozenset({len(example.segments) - 2, len(example.segments) - 1})


def test_a_model_that_knows_the_kinds_is_right(kinds: Kinds, monkeypatch: pytest.MonkeyPatch) -> None:
    """The score is the model's own log-probabilities: text alone that always says `fruit` is right for fruit alone."""
    tokenizer = prompt_tokenizer()
    model = tiny_model(CONFIGS["flamingo"])
    found = score(model, tokenizer, kinds, queries(kinds, 2 * len(kinds.names), seed=0))
    assert 0.0 <= found.accuracy <= 1.0
    fruit = tokenizer.encode_plain(" fruit")
    bias = torch.zeros(259)
    bias[fruit] = 50.0
    plain = type(model.language_model).logits
    monkeypatch.setattr(type(model.language_model), "logits", lambda self, x: plain(self, x) + bias)
    told = score(model, tokenizer, kinds, queries(kinds, 2 * len(kinds.names), seed=0))
    assert told.accuracy == pytest.approx(1 / len(kinds.names))


def test_the_command_runs_every_ablation_and_takes_up_what_is_done(data: Path, tmp_path: Path) -> None:
    config = CONFIGS["flamingo"]
    save_folder(tmp_path / "toy", config, tiny_model(config).state_dict().items(), byte_tokenizer().to_str())
    arguments = ["--steps", "2", "--queries", "6", "--data", str(data), "--out", str(tmp_path / "out")]
    options = parse([*arguments, "--model", str(tmp_path / "toy")])
    results = measure(options)
    assert [result.ablation for result in results] == [BASE, *NAMES]
    assert {result.ablation: result.steps for result in results}["round-robin"] == 4
    assert all(result.loss > 0 for result in results)
    assert load_folder(tmp_path / "out" / "mlp" / "model", "cpu", torch.float32).config.resampler.kind == "mlp"
    written = {name: (tmp_path / "out" / f"{name}.json").stat().st_mtime_ns for name in NAMES}
    assert measure(replace(options, names=["mlp", "no-gates"])) == [
        r for r in results if r.ablation in ("mlp", "no-gates")
    ]
    assert written == {name: (tmp_path / "out" / f"{name}.json").stat().st_mtime_ns for name in NAMES}


def test_a_small_model_knows_the_texts_and_nothing_of_the_pictures(
    data: Path, kinds: Kinds, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = CONFIGS["flamingo"]
    save_folder(tmp_path / "toy", config, tiny_model(config).state_dict().items(), byte_tokenizer().to_str())
    caplog.set_level("INFO")
    make_small(tmp_path / "small", tmp_path / "toy", kinds, steps=60)
    small = load_folder(tmp_path / "small", "cpu", torch.float32)
    assert small.config.vision == config.vision
    loss = float(caplog.messages[0].split(" is ")[1].split()[0])
    assert loss < 1.5  # a guess among all tokens: 5.8; kind and number alone: 0.7
    gates = [parameter for name, parameter in small.named_parameters() if name.endswith("_gate")]
    assert not any(bool(gate.any()) for gate in gates)


def test_the_table_holds_the_paper_s_change_beside_ours() -> None:
    results = [
        Result(ablation="base", steps=10, seconds=5.0, accuracy=0.5, loss=1.0),
        Result(ablation="no-gates", steps=10, seconds=4.0, accuracy=0.4, loss=1.25),
        Result(ablation="mlp", steps=10, seconds=4.0, accuracy=0.55, loss=0.9),
    ]
    lines = table(results, [read_ablation(result.ablation) for result in results], BASE).splitlines()
    assert lines[2:] == [
        "| the base |  |  | 50.0 |  | 1.000 |  | 0.50 |",
        "| no tanh gates | 64.0 (68.4) | -4.4 | 40.0 | -10.0 | 1.250 | +0.250 | 0.40 |",
        "| an MLP in the resampler's place |  |  | 55.0 | +5.0 | 0.900 | -0.100 | 0.40 |",
    ]
