"""A few-shot task with images by lmms-eval's model `openai`: `-m bench.client_scripts.lmms_eval URL MODEL`.

The expected answers are those of the same conversations in requests of this script, with the bytes of the image files.
"""

from __future__ import annotations

import base64
import sys
from functools import cache
from pathlib import Path
from typing import Any

import requests
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from bench.client_scripts.habits import expect, report
from bench.client_scripts.lmms_eval_tasks.drawings import QUESTION, word

TASK = "flamboyance_drawings"
TASKS = Path(__file__).with_name("lmms_eval_tasks")
URL, MODEL = sys.argv[1:3]


@cache
def evaluate() -> Any:
    return simple_evaluate(
        model="openai",
        model_args=f"model_version={MODEL},base_url={URL}/v1,api_key=none",
        tasks=[TASK],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False, model_name="openai"),
        batch_size=1,
    )


@cache
def samples() -> list[Any]:
    return list(evaluate()["samples"][TASK])


def expected(doc: Any) -> str:
    """Return the answer to a conversation of the task, requested directly."""
    messages: list[dict[str, Any]] = []
    for shot in doc["shots"]:
        messages += [question(shot["image"]), {"role": "assistant", "content": f"{shot['word']}."}]
    messages.append(question(doc["image"]))
    fields: dict[str, Any] = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 6}
    response = requests.post(f"{URL}/v1/chat/completions", json=fields)
    response.raise_for_status()
    return str(response.json()["choices"][0]["message"]["content"])


def question(path: str) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
    return {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}],
    }


def compare_answers() -> str:
    for sample in samples():
        answer, direct = sample["filtered_resps"][0], expected(sample["doc"])
        expect(answer == direct, f"{answer!r}, directly {direct!r}")
    return f"{len(samples())} answers, as by a request of our own"


def compare_accuracy() -> str:
    accuracy = evaluate()["results"][TASK]["exact_match,none"]
    correct = sum(word(expected(sample["doc"])) == sample["doc"]["answer"] for sample in samples())
    expect(accuracy == correct / len(samples()), f"{accuracy}, directly {correct}/{len(samples())}")
    return f"{accuracy} of {len(samples())} items, as by requests of our own"


if __name__ == "__main__":
    report({"answers": compare_answers, "accuracy": compare_accuracy})
