"""A multiple-choice task by lm-eval's `local-completions` with its defaults: `-m bench.client_scripts.lm_eval URL MODEL`.

The expected log-probabilities are those of `/v1/score`. In bfloat16 they differ in rounding: the server reads a whole text
at once for lm-eval, and a prompt and then its candidates for `/v1/score`. No two choices of the task are that close.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval
import requests
from lm_eval.tasks import TaskManager

from bench.client_scripts.habits import expect, report

TASK = "flamboyance_facts"
TASKS = Path(__file__).with_name("lm_eval_tasks")
MAX_DIFFERENCE = 0.5
URL, MODEL = sys.argv[1:3]


@cache
def evaluate() -> Any:
    return lm_eval.simple_evaluate(
        model="local-completions",
        model_args={"model": MODEL, "base_url": f"{URL}/v1/completions"},
        tasks=[TASK],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
    )


@cache
def score(sentence: str, choices: tuple[str, ...]) -> list[float]:
    """Return the log-probabilities of choices, computed by this server."""
    candidates = [f" {choice}" for choice in choices]
    response = requests.post(f"{URL}/v1/score", json={"prompt": sentence, "candidates": candidates})
    response.raise_for_status()
    return [row["logprob"] for row in response.json()["data"]]


def expected(sample: Any) -> list[float]:
    return score(sample["doc"]["sentence"], tuple(sample["doc"]["choices"]))


def compare_logprobs() -> str:
    samples = evaluate()["samples"][TASK]
    pairs = [
        (float(logprob), row)
        for sample in samples
        for (logprob, _), row in zip(sample["filtered_resps"], expected(sample), strict=True)
    ]
    difference = max(abs(logprob - row) for logprob, row in pairs)
    expect(difference < MAX_DIFFERENCE, f"the log-probabilities differ by up to {difference:.3g}")
    return f"{len(pairs)} choices, at most {difference:.2g} from /v1/score"


def compare_accuracy() -> str:
    results = evaluate()
    accuracy = results["results"][TASK]["acc,none"]
    samples = results["samples"][TASK]
    correct = 0
    for sample in samples:
        logprobs = expected(sample)
        correct += logprobs.index(max(logprobs)) == sample["doc"]["answer"]
    expect(accuracy == correct / len(samples), f"{accuracy}, by /v1/score {correct}/{len(samples)}")
    return f"{accuracy} of {len(samples)} items, as by /v1/score"


if __name__ == "__main__":
    report({"accuracy": compare_accuracy, "log-probabilities": compare_logprobs})
