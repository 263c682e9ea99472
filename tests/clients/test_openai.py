"""OpenAI's own Python client, unmodified, against this server over a socket: what it asks for it understands."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import (
    APIError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    OpenAI,
    UnprocessableEntityError,
)
from openai.types.chat import ChatCompletionMessageParam
from PIL import Image
from pydantic import BaseModel

from server.app import create_app
from server.errors import EngineDied, EngineFailed, Overloaded
from server.metrics import Metrics
from server.settings import Settings
from tests.clients.serving import CONFIG, KEY, listening, wait_until
from tests.server.fakes import FakeClient, served_model


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def data_url(colour: str) -> str:
    stream = io.BytesIO()
    Image.new("RGB", (9, 7), colour).save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def asked(text: str, colour: str) -> ChatCompletionMessageParam:
    """In the order in which OpenAI's documents show it: the text first."""
    content: Any = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": data_url(colour)}}]
    return {"role": "user", "content": content}


MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Say the colour."},
    asked("Which?", "red"),
    {"role": "assistant", "content": "red"},
    asked("Which?", "blue"),
]
GREEDY: dict[str, Any] = {"model": CONFIG.name, "temperature": 0, "extra_body": {"ignore_eos": True}}


def test_chat_whole_and_streamed_are_one_answer(client: OpenAI) -> None:
    whole = client.chat.completions.create(messages=MESSAGES, max_completion_tokens=8, **GREEDY)
    (choice,) = whole.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8
    streamed = list(
        client.chat.completions.create(
            messages=MESSAGES, max_tokens=8, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert streamed[0].choices[0].delta.role == "assistant"
    assert "".join(c.delta.content or "" for e in streamed for c in e.choices) == choice.message.content
    assert streamed[-1].usage is not None
    assert streamed[-1].usage.total_tokens == whole.usage.total_tokens


def test_an_answer_may_be_sent_back_as_it_came(client: OpenAI) -> None:
    first = client.chat.completions.create(messages=MESSAGES, max_tokens=4, **GREEDY)
    answer: Any = first.choices[0].message
    again = client.chat.completions.create(
        messages=[*MESSAGES, answer, asked("Which?", "green")], max_tokens=4, **GREEDY
    )
    assert again.usage is not None
    assert again.usage.prompt_tokens > (first.usage.prompt_tokens if first.usage else 0)


def test_another_picture_is_another_answer(client: OpenAI) -> None:
    def scores(colour: str) -> list[float]:
        reply = client.chat.completions.create(messages=[asked("a", colour)], max_tokens=2, logprobs=True, **GREEDY)
        logprobs = reply.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        return [token.logprob for token in logprobs.content]

    assert scores("red") == scores("red") != scores("blue")


def test_chat_log_probabilities(client: OpenAI) -> None:
    reply = client.chat.completions.create(messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2, **GREEDY)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 3
    for token in logprobs.content:
        assert token.top_logprobs[0].logprob == token.logprob <= 0
        assert len(token.top_logprobs) == 2


def test_several_answers(client: OpenAI) -> None:
    reply = client.chat.completions.create(messages=MESSAGES, n=3, seed=1, max_tokens=6, model=CONFIG.name)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in reply.choices}) > 1


class Colour(BaseModel):
    is_red: bool


def test_an_answer_in_the_form_of_a_class(client: OpenAI) -> None:
    reply = client.chat.completions.parse(
        messages=MESSAGES, response_format=Colour, max_tokens=300, model=CONFIG.name, seed=1
    )
    assert isinstance(reply.choices[0].message.parsed, Colour)


def test_the_streaming_helper_collects_what_it_saw(client: OpenAI) -> None:
    form = {"structured_outputs": {"choice": ["red", "blue"]}}
    with client.chat.completions.stream(messages=MESSAGES, model=CONFIG.name, extra_body=form) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content
    assert final.choices[0].message.content in {"red", "blue"}


def test_completions_whole_and_streamed(client: OpenAI) -> None:
    whole = client.completions.create(prompt="a red", max_tokens=6, logprobs=1, echo=True, **GREEDY)
    (choice,) = whole.choices
    assert choice.text.startswith("a red")
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert len(choice.logprobs.token_logprobs) == len("a red") + 6
    streamed = client.completions.create(prompt="a red", max_tokens=6, stream=True, **GREEDY)
    assert "a red" + "".join(event.choices[0].text for event in streamed) == choice.text


def test_embeddings_of_texts(client: OpenAI) -> None:
    """In the base64 that this client asks for by itself, and in numbers."""
    reply = client.embeddings.create(model=CONFIG.name, input=["a cat", "a dog", "a cat"])
    cat, dog, again = (row.embedding for row in reply.data)
    assert cat == pytest.approx(again, abs=1e-5)
    assert cat != pytest.approx(dog, abs=1e-5)
    assert sum(value * value for value in cat) == pytest.approx(1, abs=1e-3)
    numbers = client.embeddings.create(model=CONFIG.name, input="a cat", encoding_format="float")
    assert numbers.data[0].embedding == pytest.approx(cat, abs=1e-5)
    assert reply.usage.prompt_tokens == len("a cat") * 3


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list()
    assert model.id == client.models.retrieve(CONFIG.name).id == CONFIG.name


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"top_p": 2}, BadRequestError, "top_p"),
        ({"max_tokens": 100_000}, BadRequestError, "max_tokens"),
        ({"model": "other"}, NotFoundError, None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, UnprocessableEntityError, "tools"),
        ({"messages": []}, BadRequestError, "messages"),
    ],
)
def test_refusals_are_the_clients_own_errors(
    client: OpenAI, fields: dict[str, Any], kind: type[APIStatusError], param: str | None
) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"messages": MESSAGES, "model": CONFIG.name, **fields})
    assert caught.value.param == param
    assert caught.value.code
    assert caught.value.request_id == caught.value.response.headers["x-request-id"]


def test_a_stranger_is_refused(url: str) -> None:
    stranger = OpenAI(base_url=f"{url}/v1", api_key="not-the-key", max_retries=0)
    with stranger, pytest.raises(AuthenticationError):
        stranger.models.list()


@pytest.fixture
def engine() -> FakeClient:
    return FakeClient()


@pytest.fixture
def patient(engine: FakeClient, tmp_path: Path) -> Iterator[OpenAI]:
    """A client that tries once more, in front of an engine that tells a story."""
    app = create_app(engine, served_model(), Settings(data_dir=tmp_path, decode_processes=1), Metrics("tiny"))
    with listening(app) as url, OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=1) as client:
        yield client


def ask(client: OpenAI, **options: Any) -> str | None:
    reply = client.chat.completions.create(messages=[{"role": "user", "content": "x"}], model="tiny", **options)
    return reply.choices[0].message.content


def test_a_refusal_for_now_is_tried_again_and_a_failure_is_not(engine: FakeClient, patient: OpenAI) -> None:
    async def fail(place: int) -> None:
        if len(engine.requests) == 1:
            raise error

    engine.before = fail
    error: Exception = Overloaded("full")
    assert ask(patient) == "a cat"
    assert len(engine.requests) == 2
    # a request that may have killed the engine is no better, though the engine comes back
    for fatal in (EngineFailed("gave up"), EngineDied("died")):
        engine.requests.clear()
        error = fatal
        with pytest.raises(InternalServerError):
            ask(patient)
        assert len(engine.requests) == 1


def test_an_overloaded_server_is_an_error_that_says_when_to_return(engine: FakeClient, patient: OpenAI) -> None:
    async def fail(place: int) -> None:
        raise Overloaded("full")

    engine.before = fail
    with pytest.raises(InternalServerError) as caught:
        ask(patient.with_options(max_retries=0))
    assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.response.headers["x-should-retry"] == "true"


def test_an_impatient_client_gives_up_and_its_request_is_aborted(engine: FakeClient, patient: OpenAI) -> None:
    async def hang(place: int) -> None:
        await asyncio.sleep(60)

    engine.before = hang
    with pytest.raises(APITimeoutError):
        ask(patient.with_options(max_retries=0), timeout=0.2)
    wait_until(lambda: engine.aborted == [request.request_id for request in engine.requests])


def test_an_error_inside_a_stream_is_raised(engine: FakeClient, patient: OpenAI) -> None:
    async def fail(place: int) -> None:
        if place == 2:
            raise EngineFailed("gave up")

    engine.before = fail
    events = patient.chat.completions.create(
        messages=[{"role": "user", "content": "x"}], model="tiny", stream=True, max_tokens=9
    )
    with pytest.raises(APIError, match="gave up"):
        list(events)
