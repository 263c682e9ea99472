"""Two tasks with images by the command of lmms-eval: `-m bench.client_scripts.lmms_eval URL MODEL`.

The expected answers are completions of the same prompts by this repository's Python client, which sends the image files.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

from bench.client_scripts.habits import expect, report
from bench.client_scripts.lmms_eval_tasks import drawings, questions
from flamboyance_client import Client, Part, image, shot, text

FOLDER = Path(__file__).with_name("lmms_eval_tasks")
TASKS = {"drawings": drawings, "questions": questions}
URL, MODEL = sys.argv[1:3]


@cache
def evaluate() -> Path:
    """Run both tasks with the defaults of the model `openai`, and return the folder of the results."""
    output = tempfile.mkdtemp()
    command = [str(Path(sys.executable).with_name("lmms-eval")), "eval", "--model", "openai", "--batch_size", "1"]
    command += ["--model_args", f"model_version={MODEL},base_url={URL}/v1,api_key=none,num_concurrent=1"]
    command += ["--include_path", str(FOLDER), "--tasks", ",".join(f"flamboyance_{name}" for name in TASKS)]
    command += ["--output_path", output, "--log_samples"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    (folder,) = Path(output).iterdir()
    return folder


def read_accuracy(name: str) -> float:
    (file,) = evaluate().glob("*_results.json")
    return float(json.loads(file.read_text())["results"][f"flamboyance_{name}"]["exact_match,none"])


def read_answers(name: str) -> list[str]:
    (file,) = evaluate().glob(f"*_samples_flamboyance_{name}.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    return [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


def read_rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def prompt(name: str, row: Mapping[str, Any]) -> list[Part]:
    if name == "questions":
        return [image(row["image"]), text(questions.doc_to_text(row))]  # the text leads to its answer: no template
    shots = [shot(example["image"], f"{drawings.QUESTION} {example['word']}.") for example in row["shots"]]
    return [*chain.from_iterable(shots), image(row["image"]), text(drawings.QUESTION)]


def compare(name: str) -> str:
    rows, answers, accuracy = read_rows(name), read_answers(name), read_accuracy(name)
    options: dict[str, Any] = {"max_tokens": 128 if name == "questions" else 6, "temperature": 0}
    with Client(URL) as client:
        expected = [client.complete(prompt(name, row), **options).text.strip() for row in rows]
    expect(answers == expected, f"{answers}, by the Python client {expected}")
    correct = sum(TASKS[name].is_correct(row, answer) for row, answer in zip(rows, expected, strict=True))
    expect(accuracy == correct / len(rows), f"accuracy {accuracy}, by the Python client {correct} of {len(rows)}")
    return f"{len(rows)} answers and accuracy {accuracy:.3g}, as by the Python client"


if __name__ == "__main__":
    report({"few-shot conversations": partial(compare, "drawings"), "yes or no": partial(compare, "questions")})
