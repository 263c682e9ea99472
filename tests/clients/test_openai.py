"""Tests of OpenAI's Python client, unmodified, with this server on a socket."""

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
    pydantic_function_tool,
)
from openai.types.chat import ChatCompletionMessageParam
from PIL import Image
from pydantic import BaseModel

from server.app import create_app
from server.errors import EngineDied, EngineFailed, EngineStalled, Overloaded
from server.settings import Settings
from server.telemetry.metrics import Metrics
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


def question(text: str, colour: str) -> ChatCompletionMessageParam:
    """Return a message with the text before the image, as in OpenAI's documentation."""
    content: Any = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": data_url(colour)}}]
    return {"role": "user", "content": content}


MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Say the colour."},
    question("Which?", "red"),
    {"role": "assistant", "content": "red"},
    question("Which?", "blue"),
]
GREEDY: dict[str, Any] = {"model": CONFIG.name, "temperature": 0, "extra_body": {"ignore_eos": True}}


def test_chat_gives_the_same_answer_streamed_and_not(client: OpenAI) -> None:
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


def test_an_answer_can_be_sent_back_unchanged(client: OpenAI) -> None:
    first = client.chat.completions.create(messages=MESSAGES, max_tokens=4, **GREEDY)
    answer: Any = first.choices[0].message
    second = client.chat.completions.create(
        messages=[*MESSAGES, answer, question("Which?", "green")], max_tokens=4, **GREEDY
    )
    assert second.usage is not None
    assert second.usage.prompt_tokens > (first.usage.prompt_tokens if first.usage else 0)


def test_another_image_gives_another_answer(client: OpenAI) -> None:
    def scores(colour: str) -> list[float]:
        reply = client.chat.completions.create(messages=[question("a", colour)], max_tokens=2, logprobs=True, **GREEDY)
        logprobs = reply.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        return [token.logprob for token in logprobs.content]

    red = pytest.approx(scores("red"), abs=1e-5)
    assert scores("red") == red, "the second time after a cached prefix"
    assert scores("blue") != red


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


def test_an_answer_is_parsed_into_a_class(client: OpenAI) -> None:
    reply = client.chat.completions.parse(
        messages=MESSAGES, response_format=Colour, max_tokens=300, model=CONFIG.name, seed=1
    )
    assert isinstance(reply.choices[0].message.parsed, Colour)


def test_the_streaming_helper_collects_the_whole_answer(client: OpenAI) -> None:
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


@pytest.mark.parametrize("prompts", [["a red", "a blue"], [[97, 32, 114], [97, 32, 98]]])
def test_completions_of_several_prompts(client: OpenAI, prompts: Any) -> None:
    alone = [client.completions.create(prompt=prompt, max_tokens=4, **GREEDY).choices[0].text for prompt in prompts]
    together = client.completions.create(prompt=prompts, max_tokens=4, n=2, **GREEDY)
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in together.choices] == [text for text in alone for _ in range(2)]


def test_a_function_is_called_by_name(client: OpenAI) -> None:
    tool: Any = pydantic_function_tool(Colour, name="see")
    choice: Any = {"type": "function", "function": {"name": "see"}}
    fields: dict[str, Any] = {"model": CONFIG.name, "seed": 1, "max_tokens": 300}
    reply = client.chat.completions.parse(messages=MESSAGES, tools=[tool], tool_choice=choice, **fields)
    assert reply.choices[0].message.tool_calls is not None
    (call,) = reply.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Colour)
    with client.chat.completions.stream(messages=MESSAGES, tools=[tool], tool_choice=choice, **fields) as stream:
        final: Any = stream.get_final_completion().choices[0].message
    streamed = final.tool_calls
    assert streamed[0].function.name == "see"
    assert streamed[0].function.arguments == call.function.arguments
    parsed: Any = reply.choices[0].message
    for answer in (parsed, final):
        result: Any = {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "seen"}
        last = client.chat.completions.create(
            messages=[*MESSAGES, answer, result], tools=[tool], max_tokens=4, **GREEDY
        )
        assert last.choices[0].message.tool_calls is None
        assert last.choices[0].message.content


def test_embeddings_of_texts(client: OpenAI) -> None:
    """Embeddings in base64, which this client requests by default, equal those in numbers."""
    reply = client.embeddings.create(model=CONFIG.name, input=["a cat", "a dog", "a cat"])
    first_cat, dog, second_cat = (row.embedding for row in reply.data)
    assert first_cat == pytest.approx(second_cat, abs=1e-5)
    assert first_cat != pytest.approx(dog, abs=1e-5)
    assert sum(value * value for value in first_cat) == pytest.approx(1, abs=1e-3)
    numbers = client.embeddings.create(model=CONFIG.name, input="a cat", encoding_format="float")
    assert numbers.data[0].embedding == pytest.approx(first_cat, abs=1e-5)
    assert reply.usage.prompt_tokens == len("a cat") * 3


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list()
    assert model.id == client.models.retrieve(CONFIG.name).id == CONFIG.name


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"top_p": 2}, BadRequestError, "top_p"),
        ({"max_tokens": 100_000}, BadRequestError, "max_tokens"),
        ({"model": "other"}, NotFoundError, "model"),
        ({"prediction": {"type": "content", "content": "x"}}, UnprocessableEntityError, "prediction"),
        ({"messages": []}, BadRequestError, "messages"),
    ],
)
def test_errors_are_raised_as_the_errors_of_the_client(
    client: OpenAI, fields: dict[str, Any], kind: type[APIStatusError], param: str | None
) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"messages": MESSAGES, "model": CONFIG.name, **fields})
    assert caught.value.param == param
    assert caught.value.code
    assert caught.value.request_id == caught.value.response.headers["x-request-id"]


def test_a_wrong_key_is_rejected(url: str) -> None:
    unauthorised = OpenAI(base_url=f"{url}/v1", api_key="not-the-key", max_retries=0)
    with unauthorised, pytest.raises(AuthenticationError):
        unauthorised.models.list()


@pytest.fixture
def engine() -> FakeClient:
    return FakeClient()


@pytest.fixture
def retrying_client(engine: FakeClient, tmp_path: Path) -> Iterator[OpenAI]:
    """A client with one retry, and a server with a fake engine."""
    app = create_app(engine, served_model(), Settings(data_dir=tmp_path, decode_processes=1), Metrics("tiny"))
    with listening(app) as url, OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=1) as client:
        yield client


def complete(client: OpenAI, **options: Any) -> str | None:
    reply = client.chat.completions.create(messages=[{"role": "user", "content": "x"}], model="tiny", **options)
    return reply.choices[0].message.content


def test_a_temporary_error_is_retried_and_an_engine_failure_is_not(engine: FakeClient, retrying_client: OpenAI) -> None:
    async def fail(index: int) -> None:
        if len(engine.requests) == 1:
            raise error

    engine.before = fail
    error: Exception = Overloaded("full")
    assert complete(retrying_client) == "a cat"
    assert len(engine.requests) == 2
    # A request that may have killed the engine is not retried either, although the engine restarts.
    for fatal in (EngineFailed("gave up"), EngineDied("died"), EngineStalled("hung")):
        engine.requests.clear()
        error = fatal
        with pytest.raises(InternalServerError):
            complete(retrying_client)
        assert len(engine.requests) == 1


def test_an_overloaded_server_states_when_to_retry(engine: FakeClient, retrying_client: OpenAI) -> None:
    async def fail(index: int) -> None:
        raise Overloaded("full")

    engine.before = fail
    with pytest.raises(InternalServerError) as caught:
        complete(retrying_client.with_options(max_retries=0))
    assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.response.headers["x-should-retry"] == "true"


def test_a_client_timeout_aborts_the_request(engine: FakeClient, retrying_client: OpenAI) -> None:
    async def hang(index: int) -> None:
        await asyncio.sleep(60)

    engine.before = hang
    with pytest.raises(APITimeoutError):
        complete(retrying_client.with_options(max_retries=0), timeout=0.2)
    wait_until(lambda: engine.aborted == [request.request_id for request in engine.requests])


def test_an_error_inside_a_stream_raises(engine: FakeClient, retrying_client: OpenAI) -> None:
    async def fail(index: int) -> None:
        if index == 2:
            raise EngineFailed("gave up")

    engine.before = fail
    events = retrying_client.chat.completions.create(
        messages=[{"role": "user", "content": "x"}], model="tiny", stream=True, max_tokens=9
    )
    with pytest.raises(APIError, match="gave up"):
        list(events)
