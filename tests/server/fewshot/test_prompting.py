"""Assembled prompts equal prompts that a client writes by hand, part by part."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from fastapi import FastAPI

from server.api.services import Services
from server.errors import InvalidRequest
from server.fewshot.prompting import AssembledPrompt, assemble, read_question
from server.prompt import prepare_prompts
from server.schemas.base import read
from server.schemas.fewshot import FewShotFields
from server.schemas.generation import CompletionRequest
from tests.server.conftest import data_url, image_part, png

pytestmark = pytest.mark.anyio
CAT, DOG, QUERY = png("red"), png("green"), png("blue")


@pytest.fixture
def services(app: FastAPI) -> Services:
    services: Services = app.state.services
    return services


async def assemble_from(services: Services, **body: Any) -> AssembledPrompt:
    fields = read(FewShotFields, msgspec.json.encode(body))
    question = await read_question(fields, services.model, services.shots)
    return await assemble(question, services.model, services.shots)


async def by_hand(services: Services, *parts: Any) -> list[int]:
    prompt = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    fields = read(CompletionRequest, msgspec.json.encode({"prompt": prompt}))
    (prepared,) = await prepare_prompts(fields.prompt, services.model, services.intake)
    return prepared.encoded.token_ids


END = {"type": "end_of_chunk"}
SHOTS = [
    {"image": data_url(CAT), "answer": "a cat", "id": "one"},
    {"media": [image_part(DOG)], "text": "a dog", "label": "dog"},
]


async def test_shots_are_written_like_by_hand(services: Services) -> None:
    assembled = await assemble_from(services, shots=SHOTS, query={"image": data_url(QUERY)})
    hand = [image_part(CAT), "Output:a cat", END, "\n", image_part(DOG), "Output:a dog", END, "\n"]
    assert assembled.prompt.encoded.token_ids == await by_hand(services, *hand, image_part(QUERY), "Output:")
    assert [media.data for media in assembled.prompt.media.values()] == [CAT, DOG, QUERY]
    assert [(used.id, used.label, used.score) for used in assembled.shots] == [("one", "", None), (None, "dog", None)]


async def test_too_many_media_are_refused_with_what_to_do(services: Services) -> None:
    limit = services.intake.settings.max_media_per_request
    with pytest.raises(
        InvalidRequest, match=f"{limit + 1} images .* is {limit}: store examples as a support set"
    ) as shots:
        await assemble_from(services, shots=[SHOTS[0]] * limit, query={"image": data_url(QUERY)})
    assert shots.value.param == "shots"
    with pytest.raises(InvalidRequest, match=f"{limit + 1} images .* is {limit}$") as query:
        await assemble_from(services, query={"media": [image_part(QUERY)] * (limit + 1)})
    assert query.value.param == "query"


async def test_zero_shot_writes_shots_without_their_media(services: Services) -> None:
    assembled = await assemble_from(services, shots=SHOTS, query={"image": data_url(QUERY)}, zero_shot=True)
    hand = ["Output:a cat", END, "\n", "Output:a dog", END, "\n", image_part(QUERY), "Output:"]
    assert assembled.prompt.encoded.token_ids == await by_hand(services, *hand)
    assert [media.data for media in assembled.prompt.media.values()] == [QUERY]


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (
            {"query": {}},
            r"^the query has no image or video, which the template 'caption' shows as \{media\}: set query.image or "
            r"query.media, or choose a template without \{media\}, such as \{\"shot\"",
            "query.image",
        ),
        ({"query": {"image": "x", "question": "?"}}, r"has no \{question\}", "query.question"),
        ({"query": {"image": "x"}, "template": "poem"}, "unknown template 'poem', known are caption", "template"),
        ({"query": {"image": "x"}, "template": {"shot": "{media}{x}"}}, r"template.shot: .*\{x\}", "template.shot"),
        (
            {"query": {"image": "x"}, "shots": [{"text": "a"}]},
            r"^shots\[0\] has no image or video, .*: set zero_shot, .* or choose a template without",
            "shots[0]",
        ),
        (
            {"query": {"image": "x"}, "template": {"shot": "{text} {answer}"}},
            r"the query has media: choose a template with \{media\}, such as 'caption'",
            "query",
        ),
        (
            {"query": {"image": "a.png"}},
            r"^the image must be a data URL \(data:image/...;base64,...\) or the id of an uploaded image or video; "
            "the server reads no files by name$",
            "query.image",
        ),
    ],
)
async def test_an_error_names_the_invalid_field(
    services: Services, body: dict[str, Any], message: str, param: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as refusal:
        await assemble_from(services, **body)
    assert refusal.value.param == param


@pytest.mark.parametrize(
    ("shot", "message"),
    [
        ({"text": "a", "answer": "b"}, "give either text or answer"),
        ({"image": "x", "media": [image_part()]}, "give either image or media"),
        ({"caption": "a"}, "unknown parameter shots\\[0\\].caption"),
        ({"answer": 3}, "shots\\[0\\].text"),
    ],
)
async def test_an_error_names_the_invalid_field_of_a_shot(services: Services, shot: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        await assemble_from(services, shots=[shot], query={"image": data_url(QUERY)})
