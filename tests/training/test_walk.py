"""The first page of docs/training.md runs as written: join, make data, train, serve."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from model.folder import load_folder
from tests.server.conftest import image_part
from tests.server.test_main import running
from tests.training.toy import COLOURS, png

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens" / "openflamingo"
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
PROGRAMS = {"python": [sys.executable], "flamboyance": [sys.executable, "-m", "flamboyance"]}


def first_block(language: str) -> str:
    """Return the content of the page's first block of code in a language."""
    match = re.search(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    assert match is not None
    return match[1]


def write_pages(folder: Path) -> None:
    """Write pages of two images with the form of the documented one, and their images."""
    (example,) = first_block("json").splitlines()
    assert all((ROOT / file).is_file() for file in json.loads(example)["images"] if file)
    example = example.replace("docs/examples/noto-", "")
    names = list(COLOURS)
    lines = []
    for name, colour in COLOURS.items():
        (folder / f"{name}.png").write_bytes(png(colour))
    for first, second in zip(names, names[1:] + names[:1], strict=True):
        lines.append(example.replace("banana", first).replace("bicycle", second))
    (folder / "pages.jsonl").write_text("\n".join(lines))


def run(command: str, folder: Path) -> str:
    program, *words = shlex.split(command)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*PROGRAMS[program], *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the page's commands but the last, and return their folder."""
    folder = tmp_path_factory.mktemp("walk")
    shutil.copytree(GOLDENS / "llama" / "language_model", folder / "decoder")
    shutil.copytree(GOLDENS / "clip", folder / "encoder")
    write_pages(folder)
    (folder / "run.yaml").write_text(first_block("yaml"))
    join, make, train, _ = first_block("sh").splitlines()
    assert "gates are closed" in run(join, folder)
    assert run(make, folder) == "4 records in shards/pages\n"
    output = run(train, folder)
    assert "ready to serve" in output
    assert "warning" not in output
    return folder


def test_the_run_learns_and_changes_no_expert(walk: Path) -> None:
    log = [json.loads(line) for line in (walk / "birds" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == yaml.safe_load(first_block("yaml"))["steps"] - 1
    assert log[-1]["losses"]["pages"] < 0.7 * log[0]["losses"]["pages"]
    start, trained = (load_folder(walk / name, "cpu", torch.float32) for name in ("start", "birds/model"))
    before, after = start.state_dict(), trained.state_dict()
    experts = {n for n in before if n.startswith(("vision.", "language_model.")) and not n.endswith("new_rows")}
    assert all(torch.equal(before[name], after[name]) for name in experts)
    assert not any(gate for layer in start.gated_layers().values() for gate in layer.openness())
    assert all(gate for layer in trained.gated_layers().values() for gate in layer.openness())


def same(logprobs: list[float]) -> Any:
    """Return what equals these values up to rounding: the division of a prompt into steps depends on measured times."""
    return pytest.approx(logprobs, abs=1e-5)


def test_the_trained_model_is_served_under_its_own_name(walk: Path) -> None:
    *program, folder = shlex.split(first_block("sh").splitlines()[-1])
    assert program == ["flamboyance", "serve"]
    with running(walk / folder, walk / "log", "-m", *program) as server:
        (model,) = server.http.get("/v1/models").json()["data"]
        assert model["id"] == "birds"
        answers = []
        for colour in COLOURS.values():
            prompt = [image_part(png(colour)), {"type": "text", "text": "This is a"}]
            body = server.complete(prompt=prompt, max_tokens=4, temperature=0, logprobs=1)
            answers.append(body["choices"][0]["logprobs"]["token_logprobs"])
        assert all(answers)
        assert all(answer != same(answers[0]) for answer in answers[1:])


def test_the_start_model_answers_the_same_whatever_the_image(walk: Path) -> None:
    with running(walk / "start", walk / "start-log", "-m", "server") as server:
        answers = []
        for colour in COLOURS.values():
            prompt = [image_part(png(colour)), {"type": "text", "text": "This is a"}]
            body = server.complete(prompt=prompt, max_tokens=4, temperature=0, logprobs=1)
            answers.append((body["choices"][0]["text"], body["choices"][0]["logprobs"]["token_logprobs"]))
        (text, logprobs), *_ = answers
        assert all(answer == (text, same(logprobs)) for answer in answers)
        assert "the gates are closed" in server.log.read_text()
