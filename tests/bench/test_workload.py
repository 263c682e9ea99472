"""The workload: the same from a seed everywhere, support sets shared, prompts of one length, parts that the API takes."""

from __future__ import annotations

import asyncio

import pytest

from bench import random_models
from bench.workload import TEXT_LENGTH, Prompts, frames_of, greedy, picture, text
from model.tokenizer import PromptTokenizer
from server.media.intake import Intake
from server.media.store import MediaStore
from server.prompt import prepare_prompt
from server.schemas.generation import CompletionRequest
from server.served_model import ServedModel
from server.settings import Settings

SIZE = random_models.SIZES["tiny"]
CONFIG = random_models.config("tiny", SIZE)


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(random_models.tokenizer(SIZE), random_models.tokenizer(SIZE), CONFIG.prompt)


def test_texts_have_one_length_and_differ() -> None:
    texts = [text(seed) for seed in range(200)]
    assert {len(t) for t in texts} == {TEXT_LENGTH}
    assert len(set(texts)) > 100
    assert texts == [text(seed) for seed in range(200)]


def test_pictures_differ_and_come_again_from_their_seed() -> None:
    assert picture(1).digest != picture(2).digest
    again = picture.__wrapped__(1)
    assert again.digest == picture(1).digest


def test_queries_differ_and_share_their_support_set(tokenizer: PromptTokenizer) -> None:
    first, second = Prompts(tokenizer).shared(2, 3)
    assert first.shots == second.shots
    assert first.query.picture != second.query.picture
    requests = [p.request("x", tokenizer, greedy(1)) for p in (first, second)]
    assert requests[0].prompt.media[:3] == requests[1].prompt.media[:3]
    assert len(requests[0].prompt.token_ids) == len(requests[1].prompt.token_ids)


def test_a_question_about_a_picture_seen_before_is_new_in_its_text_alone(tokenizer: PromptTokenizer) -> None:
    prompts = Prompts(tokenizer)
    shots = prompts.support_set(2)
    cold = prompts.ask(shots)
    warm = prompts.ask(shots, seen=cold.query.picture)
    assert warm.query.picture == cold.query.picture
    assert warm.query.text != cold.query.text


def test_every_media_has_its_frames(tokenizer: PromptTokenizer) -> None:
    asked = Prompts(tokenizer).shared(2, 2)
    frames = frames_of(asked, CONFIG.vision)
    assert frames.keys() == {digest for p in asked for digest in p.request("x", tokenizer, greedy(1)).prompt.media}
    assert {f.shape for f in frames.values()} == {(1, SIZE.image_size, SIZE.image_size, 3)}


def test_over_http_a_prompt_is_the_same_tokens_and_media(tokenizer: PromptTokenizer) -> None:
    prompt = Prompts(tokenizer).ask(Prompts(tokenizer).support_set(2))
    request = prompt.request("x", tokenizer, greedy(1))
    asked = CompletionRequest.model_validate({"prompt": prompt.parts()})
    intake = Intake(Settings.model_validate({}), MediaStore("memory://"))
    read = asyncio.run(prepare_prompt(asked.prompt, ServedModel("tiny", CONFIG, tokenizer, 1024), intake))
    assert read.encoded.token_ids == request.prompt.token_ids
    assert read.encoded.media == request.prompt.media
