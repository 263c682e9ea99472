"""Imported checkpoints of both families answer over HTTP like their original libraries."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from model.checkpoint.__main__ import main
from tests.model.checkpoint import test_idefics as idefics
from tests.model.checkpoint.test_openflamingo import EVERY_N_LAYERS, GOLDENS, arguments
from tests.server.test_main import Server, running

TOLERANCE = 2e-3


def image_part(data: bytes) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def openflamingo_part(kind: str, value: str) -> dict[str, Any]:
    if kind == "image":
        return image_part((GOLDENS / "images" / value).read_bytes())
    return {"type": "text", "text": value} if kind == "text" else {"type": "end_of_chunk"}


def idefics_part(part: str | Image.Image) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    buffer = io.BytesIO()
    part.save(buffer, "PNG")
    return image_part(buffer.getvalue())


def assert_completion(
    server: Server, parts: list[dict[str, Any]], log_probs: torch.Tensor, prompt_ids: list[int], greedy: list[int]
) -> None:
    """Compare a completion with `log_probs` [T, V], the log-probabilities after each prompt token."""
    fields = {"echo": True, "logprobs": 0, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    (choice,) = server.complete(prompt=parts, max_tokens=len(greedy), **fields)["choices"]
    assert choice["prompt_token_ids"] == prompt_ids
    assert choice["token_ids"] == greedy
    token_logprobs = choice["logprobs"]["token_logprobs"]
    assert token_logprobs[0] is None
    expected = [float(log_probs[index, token_id]) for index, token_id in enumerate(prompt_ids[1:])]
    assert token_logprobs[1 : len(prompt_ids)] == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("name", EVERY_N_LAYERS)
def test_openflamingo_checkpoints_answer_like_the_original(name: str, tmp_path: Path) -> None:
    assert main(arguments(name, tmp_path / "model")) == 0
    cases = json.loads((GOLDENS / name / "expected.json").read_text())
    stored = load_file(GOLDENS / name / "expected.safetensors")
    with running(tmp_path / "model", tmp_path / "log", "-m", "server") as server:
        for case, expected in cases.items():
            if all(kind != "video" for kind, _ in expected["segments"]):
                parts = [openflamingo_part(*segment) for segment in expected["segments"]]
                assert_completion(server, parts, stored[case], expected["token_ids"], expected["greedy"])


def test_an_idefics_checkpoint_answers_like_the_original(tmp_path: Path) -> None:
    processor = idefics.make_processor()
    theirs = idefics.make_model(len(processor.tokenizer), **idefics.VARIANTS["as_released"])
    pair = idefics.Pair.of(theirs, processor, tmp_path)
    suppressed = list(pair.tokenizer.suppressed_ids)
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": suppressed, "eos_token_id": None}
    with running(tmp_path / "ours", tmp_path / "log", "-m", "server") as server:
        for parts in idefics.PROMPTS.values():
            inputs = processor(text=[list(parts)])
            prompt_ids = inputs["input_ids"][0].tolist()
            with torch.inference_mode():
                log_probs = theirs(**inputs).logits[0].log_softmax(-1)
                greedy = theirs.generate(**inputs, **options)[0, len(prompt_ids) :].tolist()
            assert_completion(server, [idefics_part(part) for part in parts], log_probs, prompt_ids, greedy)
