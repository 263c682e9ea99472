"""Questions of the task, each about one image and to be answered by yes or no.

lmms-eval imports this file by its path, so it imports nothing of this repository.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    return [Image.open(doc["image"]).convert("RGB")]


def doc_to_text(doc: Mapping[str, Any]) -> str:
    return f"Question: Is there {doc['thing']} in the image? Short answer:"


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return {"exact_match": float(is_correct(doc, results[0]))}


def is_correct(doc: Mapping[str, Any], answer: str) -> bool:
    return answer.strip() == doc["answer"]
