"""Conversations of the task: each shot is a question with an image and its answer, and the last question has no answer.

lmms-eval imports this file by its path, so it imports nothing of this repository.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

QUESTION = "This is a"


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in [*(shot["image"] for shot in doc["shots"]), doc["image"]]]


def doc_to_text(doc: Mapping[str, Any]) -> str:
    return QUESTION


def doc_to_messages(doc: Mapping[str, Any]) -> list[dict[str, Any]]:
    *shots, query = doc_to_visual(doc)
    messages = []
    for image, shot in zip(shots, doc["shots"], strict=True):
        messages += [question(image), {"role": "assistant", "content": [{"type": "text", "text": f"{shot['word']}."}]}]
    return [*messages, question(query)]


def question(image: Image.Image) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image", "url": image}, {"type": "text", "text": QUESTION}]}


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return {"exact_match": float(is_correct(doc, results[0]))}


def is_correct(doc: Mapping[str, Any], answer: str) -> bool:
    return answer.partition(".")[0].strip() == doc["answer"]
