"""Tests of the workload: reproducible seeds, shared support sets, prompts of equal length, and valid parts of the API."""

from __future__ import annotations

import asyncio
from unittest.mock import create_autospec

import pytest

from bench import random_models
from bench.workload import TEXT_LENGTH, Prompts, frames_of, greedy, random_image, random_text
from model.prompt import PromptTokenizer
from server.media.intake import Intake
from server.media.pool import DecodePool
from server.media.store import MediaStore
from server.prompt import prepare_prompts
from server.schemas.generation import CompletionRequest
from server.served_model import ServedModel
from server.settings import Settings

SIZE = random_models.SIZES["tiny"]
CONFIG = random_models.config("tiny", SIZE)


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(random_models.tokenizer(SIZE), random_models.tokenizer(SIZE), CONFIG.prompt)


def test_texts_differ_and_have_the_same_length() -> None:
    texts = [random_text(seed) for seed in range(200)]
    assert {len(t) for t in texts} == {TEXT_LENGTH}
    assert len(set(texts)) > 100
    assert texts == [random_text(seed) for seed in range(200)]


def test_images_differ_and_depend_on_their_seed_alone() -> None:
    assert random_image(1).digest != random_image(2).digest
    uncached = random_image.__wrapped__(1)
    assert uncached.digest == random_image(1).digest


def test_queries_differ_and_share_their_support_set(tokenizer: PromptTokenizer) -> None:
    first, second = Prompts(tokenizer).sharing_shots(2, 3)
    assert first.shots == second.shots
    assert first.query.image != second.query.image
    requests = [prompt.request("x", tokenizer, greedy(1)) for prompt in (first, second)]
    assert requests[0].prompt.media[:3] == requests[1].prompt.media[:3]
    assert len(requests[0].prompt.token_ids) == len(requests[1].prompt.token_ids)


def test_a_prompt_with_a_known_image_has_a_new_text(tokenizer: PromptTokenizer) -> None:
    prompts = Prompts(tokenizer)
    shots = prompts.new_support_set(2)
    cold = prompts.new_prompt(shots)
    warm = prompts.new_prompt(shots, cold.query.image)
    assert warm.query.image == cold.query.image
    assert warm.query.text != cold.query.text


def test_every_media_item_has_its_frames(tokenizer: PromptTokenizer) -> None:
    prompts = Prompts(tokenizer).sharing_shots(2, 2)
    frames = frames_of(prompts, CONFIG.vision)
    assert frames.keys() == {
        digest for prompt in prompts for digest in prompt.request("x", tokenizer, greedy(1)).prompt.media
    }
    assert {f.shape for f in frames.values()} == {(1, SIZE.image_size, SIZE.image_size, 3)}


def test_the_http_parts_of_a_prompt_give_the_same_tokens_and_media(tokenizer: PromptTokenizer) -> None:
    prompt = Prompts(tokenizer).new_prompt(Prompts(tokenizer).new_support_set(2))
    request = prompt.request("x", tokenizer, greedy(1))
    completion = CompletionRequest.model_validate({"prompt": prompt.parts()})
    intake = Intake(Settings.model_validate({}), MediaStore("memory://"), create_autospec(DecodePool))
    model = ServedModel("tiny", CONFIG, tokenizer, 1024)
    (prepared,) = asyncio.run(prepare_prompts(completion.prompt, model, intake))
    assert prepared.encoded.token_ids == request.prompt.token_ids
    assert prepared.encoded.media == request.prompt.media
