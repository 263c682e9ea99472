"""Tests of the ablations: their files, their data and queries, and the whole command at toy size."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.config import ConfigError
from model.flamingo import Flamingo
from model.folder import load_folder, save_folder
from tests.tiny_models import CONFIGS, byte_tokenizer, prompt_tokenizer, tiny_model
from tests.training.default.data import make_folder
from training.ablations import ablation, clip
from training.ablations.__main__ import Options, measure_speed, missing_runs, parse, run_missing
from training.ablations.ablation import BASE, PaperScore, ablation_names, read_ablation
from training.ablations.data import SHOTS, Captions, Kinds, Sequences, draw_queries, query_example
from training.ablations.run import Scale, build_trainer, read_gates, run_config
from training.ablations.score import score
from training.ablations.small import build_small_model
from training.ablations.table import Runs, format_table, read_runs, state_of_base
from training.default.catalogue import Catalogue, row_of
from training.default_data.records import read_records
from training.default_data.split import is_held_out_image
from training.stored_runs import read_run

NAMES = [
    "all-previous",
    "clip",
    "from-scratch",
    "interval-2",
    "interval-4",
    "mlp",
    "no-gates",
    "no-interleaved",
    "no-pairs",
    "round-robin",
    "transformer",
    "unfrozen",
]
# the paper's later printing, whose base is 70.7
PUBLISHED = {
    "no-gates": 66.5,
    "all-previous": 63.5,
    "no-interleaved": 53.4,
    "no-pairs": 60.9,
    "round-robin": 62.9,
    "interval-4": 68.8,
    "clip": 64.9,
    "unfrozen": 62.7,
    "from-scratch": 57.8,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("data"))
    for number, record in enumerate(read_records(folder)):
        file = folder / record.image
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    return folder


@pytest.fixture(scope="module")
def kinds(data: Path) -> Kinds:
    return Kinds(Catalogue(data))


def test_each_ablation_has_a_file_that_changes_one_thing() -> None:
    assert ablation_names() == [BASE, *NAMES]
    base = read_ablation(BASE).config
    changed = {
        name: {f for f in base.__slots__ if getattr(read_ablation(name).config, f) != getattr(base, f)}
        for name in NAMES
    }
    assert changed.pop("unfrozen") == {"trains"}
    assert changed.pop("from-scratch") == {"trains", "language_model"}
    assert changed.pop("no-interleaved") == changed.pop("no-pairs") == {"sets"}
    assert changed.pop("clip") == set()
    assert [name for name in NAMES if read_ablation(name).encoder != "base"] == ["clip"]
    assert changed.pop("round-robin") == {"accumulate"}
    assert set(map(tuple, changed.values())) == {("ablate",)}


def test_the_papers_scores_are_of_one_printing() -> None:
    scores = {name: paper for name in NAMES if (paper := read_ablation(name).paper)}
    assert scores == {name: PaperScore(overall=overall, base=70.7) for name, overall in PUBLISHED.items()}


def test_each_set_of_the_base_is_left_out_once() -> None:
    left = {name: [data_set.name for data_set in read_ablation(name).config.sets] for name in NAMES}
    assert left["no-interleaved"] == ["captions"]
    assert left["no-pairs"] == ["sequences"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("says: x\nruns: {}", "odd.yaml: unknown key runs"),
        ("says: x\nrun: {ablate: {gate: shut}}", "config.ablate.gate: 'shut' is not one of"),
        ("says: x\nwithout: [pages]", "odd.yaml: without: the base has no set pages"),
        ("says: x\nencoder: eyes", "odd.yaml: encoder is 'eyes', must be one of base, clip"),
        ("says: x\npaper: {overall: 1.0}", "odd.yaml: paper: missing key base"),
    ],
)
def test_an_invalid_file_is_refused(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.yaml").write_text((ablation.FOLDER / "base.yaml").read_text())
    (tmp_path / "odd.yaml").write_text(text)
    monkeypatch.setattr(ablation, "FOLDER", tmp_path)
    with pytest.raises(ConfigError, match=message):
        read_ablation("odd")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="'no-lunch' is not an ablation, must be one of base, all-previous"):
        read_ablation("no-lunch")


def test_queries_show_images_on_which_no_run_was_trained(kinds: Kinds) -> None:
    tokenizer = prompt_tokenizer()
    training_rows = {row for rows in kinds.training_rows.values() for row in rows}
    records = kinds.catalogue.records
    for example_at in (Sequences(kinds, tokenizer, 0), Captions(kinds, tokenizer, 0)):
        for number in range(30):
            assert {row_of(media) for media in example_at(number).media} <= training_rows
    queries = draw_queries(kinds, 3 * len(kinds.names), seed=1)
    assert set(Counter(query.kind for query in queries).values()) == {3}
    for query in queries:
        assert query.row not in training_rows
        assert is_held_out_image(records[query.row].image)
        assert records[query.row].category == query.kind
        assert len({name for _, name in query.shots}) == SHOTS


def test_only_the_answer_is_scored(kinds: Kinds) -> None:
    (query,) = draw_queries(kinds, 1, seed=0)
    example = query_example(query, "fruit")
    assert example.answers == frozenset({len(example.segments) - 2, len(example.segments) - 1})


def test_the_score_follows_the_models_log_probabilities(kinds: Kinds, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that always predicts `fruit` is correct for fruit only."""
    tokenizer = prompt_tokenizer()
    model = tiny_model(CONFIGS["flamingo"])
    queries = draw_queries(kinds, 2 * len(kinds.names), seed=0)
    unbiased_score = score(model, tokenizer, kinds, queries)
    assert 0.0 <= unbiased_score.accuracy <= 1.0
    fruit = tokenizer.encode_plain(" fruit")
    bias = torch.zeros(259)
    bias[fruit] = 50.0
    plain = type(model.language_model).logits
    monkeypatch.setattr(type(model.language_model), "logits", lambda self, x: plain(self, x) + bias)
    biased_score = score(model, tokenizer, kinds, queries)
    assert biased_score.accuracy == pytest.approx(1 / len(kinds.names))


def make_options(data: Path, folder: Path, *arguments: str) -> Options:
    """Return the options of a tiny table with a toy model."""
    config = CONFIGS["flamingo"]
    if not (folder / "toy").exists():
        save_folder(folder / "toy", config, tiny_model(config).state_dict().items(), byte_tokenizer().to_str())
    paths = ["--data", str(data), "--out", str(folder / "out"), "--runs", str(folder / "runs")]
    scale = ["--steps", "3", "--queries", "6", "--pretrain-steps", "2", "--model", str(folder / "toy")]
    options, _ = parse([*arguments, *paths, *scale])
    return options


def exported(out: Path, name: str) -> Flamingo:
    (folder,) = out.glob(f"{name}-0-*/model")
    return load_folder(folder, "cpu", torch.float32)


def read_table(options: Options) -> Runs:
    return read_runs(options.runs, options.scale, options.seeds, options.names)


def test_the_command_runs_every_ablation_and_repeats_no_finished_run(data: Path, tmp_path: Path) -> None:
    options = make_options(data, tmp_path, "--seeds", "0")
    run_missing(options)
    results = read_table(options).results
    assert list(results) == [BASE, *NAMES]
    assert results["round-robin"][0]["steps"] == 6
    assert all(len(runs[0]["correct"]) == 6 and runs[0]["loss"] > 0 for runs in results.values())
    assert [part["step"] for part in results[BASE][0]["progress"]] == [1, 2]
    assert exported(tmp_path / "out", "mlp").config.resampler.kind == "mlp"
    assert exported(tmp_path / "out", "clip").config.vision == clip.VISION
    files = sorted((tmp_path / "runs").iterdir())
    modified = [file.stat().st_mtime_ns for file in files]
    run_missing(options)
    assert modified == [file.stat().st_mtime_ns for file in files]


def test_the_gates_of_a_log_are_thinned_to_few_steps(tmp_path: Path) -> None:
    lines = [{"step": step, "gates": {"gated.0.attn_gate": step / 100}} for step in [9, *range(9, 400, 10)]]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    gates = read_gates(tmp_path / "log.jsonl")
    assert len(gates["steps"]) == 20
    assert gates["steps"][-1] == 400
    assert gates["values"]["gated.0.attn_gate"][-1] == 3.99
    assert read_gates(tmp_path / "no.jsonl") == {}
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 9, "gates": {}}))
    assert read_gates(tmp_path / "log.jsonl") == {}


def test_an_interrupted_table_continues_seed_by_seed(data: Path, tmp_path: Path) -> None:
    options = make_options(data, tmp_path, BASE, "mlp", "--seeds", "0", "1")
    assert [(ablation.name, seed) for ablation, seed in missing_runs(options)] == [
        (BASE, 0),
        ("mlp", 0),
        (BASE, 1),
        ("mlp", 1),
    ]
    run_missing(replace(options, names=[BASE]))
    run_missing(replace(options, seeds=[0]))
    assert [(ablation.name, seed) for ablation, seed in missing_runs(options)] == [("mlp", 1)]
    assert read_table(options).missing() == ["mlp-1"]


def test_seeds_differ_in_the_start_of_the_bridge(data: Path, tmp_path: Path) -> None:
    options = make_options(data, tmp_path, BASE, "--seeds", "0", "1")
    starts = []
    for seed in options.seeds:
        config = run_config(read_ablation(BASE), options.scale, seed, tmp_path / "toy", data, options.out)
        starts.append(build_trainer(config)[0].model.state_dict()["resampler.latents"])
    assert not torch.equal(*starts)


def test_a_step_of_each_row_is_compared_with_a_step_of_the_base(data: Path, tmp_path: Path) -> None:
    options = replace(make_options(data, tmp_path, "round-robin"), pairs=4, scale=Scale(steps=20))
    measure_speed(options)
    row = read_run(options.runs / "speed.json")
    assert row is not None
    assert row["rows"]["round-robin"]["pairs"] == 4
    assert row["rows"]["round-robin"]["ratio"] > 0


def test_the_small_model_knows_the_texts_and_has_closed_gates(
    data: Path, kinds: Kinds, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = CONFIGS["flamingo"]
    save_folder(tmp_path / "toy", config, tiny_model(config).state_dict().items(), byte_tokenizer().to_str())
    caplog.set_level("INFO")
    build_small_model(tmp_path / "small", tmp_path / "toy", kinds, steps=60)
    small = load_folder(tmp_path / "small", "cpu", torch.float32)
    assert small.config.vision == config.vision
    loss = float(caplog.messages[0].split(" is ")[1].split()[0])
    assert loss < 1.5  # a uniform guess: 5.8; with only kind and number unknown: 0.7
    gates = [parameter for name, parameter in small.named_parameters() if name.endswith("_gate")]
    assert not any(bool(gate.any()) for gate in gates)


def test_the_clip_encoder_learns_what_the_kinds_look_like(
    data: Path, kinds: Kinds, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Images of one colour per kind; their features go to the rows of the images."""
    colours = {name: np.full((64, 64, 3), 40 * number, dtype=np.uint8) for number, name in enumerate(kinds.names)}
    squares = {row: colours[name] for name in kinds.names for row in kinds.training_rows[name]}
    caplog.set_level("INFO")
    for steps in (1, 40):
        encoder = clip.train_encoder(squares, kinds, prompt_tokenizer(), steps)
    first, last = (float(message.split(" is ")[1].split()[0]) for message in caplog.messages)
    assert last < first - 1.0
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    clip.save_features(tmp_path, kinds, encoder, squares)
    saved = Catalogue(tmp_path)
    assert saved.records == kinds.catalogue.records
    means = torch.stack([saved.pooled(kinds.training_rows[name][0]) for name in kinds.names])
    further = torch.stack([saved.pooled(kinds.training_rows[name][-1]) for name in kinds.names])
    assert torch.cdist(means, further).argmin(1).tolist() == list(range(len(kinds.names)))


def result(correct: int, loss: float = 1.0) -> dict[str, Any]:
    return {"correct": "1" * correct + "0" * (100 - correct), "loss": loss, "progress": []}


def make_runs(**correct: tuple[int, ...]) -> Runs:
    """Return runs of seeds 0, 1, 2 with these numbers of correct answers out of 100."""
    results = {
        name.replace("_", "-"): {seed: result(count) for seed, count in enumerate(counts)}
        for name, counts in correct.items()
    }
    return Runs(results, (0, 1, 2), {"no-gates": 0.9})


def test_the_table_compares_the_signs_of_the_papers_change_and_ours() -> None:
    runs = make_runs(
        base=(50, 52, 54), no_gates=(44, 45, 49), no_pairs=(56, 58, 61), round_robin=(40, 60, 50), mlp=(55, 55, 55)
    )
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in format_table(runs).splitlines()[2:]}
    assert lines["base"][2] == "52.0"
    assert lines["no tanh gates"][0:3] == ["66.5 (70.7)", "-4.2", "46.0"]
    assert lines["no tanh gates"][3].startswith("-6.0 [")
    assert lines["no tanh gates"][5:] == ["same", "0.90 |"]
    assert lines["without image-text pairs"][5] == "other"
    assert lines["one set per step, round-robin"][5] == "undecided"
    assert lines["an MLP instead of the resampler"][5] == ""


def test_a_row_without_runs_is_missing() -> None:
    runs = make_runs(base=(50, 52), no_gates=())
    row = format_table(runs).splitlines()[-1]
    assert row == "| no tanh gates | 66.5 (70.7) | -4.2 | missing |  |  | missing | 0.90 |"
    assert runs.missing() == ["no-gates-0", "no-gates-1", "base-2", "no-gates-2"]


@pytest.mark.parametrize(
    ("correct", "before", "sentences"),
    [
        ((60, 62, 64), (60, 63, 63), ["at least 3 times chance", "flat within 5 points"]),
        ((60, 62, 64), (50, 63, 64), ["at least 3 times chance", "undecided whether it is flat"]),
        ((30, 31, 32), (20, 21, 23), ["LESS than 3 times chance", ": NOT flat"]),
    ],
)
def test_the_state_of_the_base_is_stated(
    correct: tuple[int, ...], before: tuple[int, ...], sentences: list[str]
) -> None:
    pairs = enumerate(zip(correct, before, strict=True))
    base = {seed: result(end) | {"progress": [result(0), result(count)]} for seed, (end, count) in pairs}
    runs = Runs({BASE: base}, (0, 1, 2), {})
    for part, sentence in zip(sentences, state_of_base(runs), strict=True):
        assert part in sentence
