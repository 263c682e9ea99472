"""Third-party clients, unmodified, with the default model: what they parse, call, batch and embed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import httpx
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_openai import OpenAI as LangChainOpenAI
from langchain_openai.decisions import Choice, OpenAIDecisions, Predicate, Score
from openai import OpenAI
from pydantic import BaseModel, Field, SecretStr

from model.zoo.default import DEFAULT, prepare
from tests.server.conftest import data_url, png
from tests.server.test_main import running

TEXT = "John Smith, 42, lives at 12 Main Street, Springfield."


class Address(BaseModel):
    street: str
    city: str
    kind: Literal["home", "work"]


class Person(BaseModel):
    """A person, with a list and a string that have no limit, and fields that may be missing."""

    name: str
    age: int
    email: str | None = None
    address: Address | None = None
    notes: list[str] = Field(default_factory=list)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(prepare(), tmp_path_factory.mktemp("log") / "log", "-m", "server") as server:
        yield f"{str(server.http.base_url).rstrip('/')}/v1"


@pytest.fixture
def common(url: str) -> Iterator[dict[str, Any]]:
    """Arguments of LangChain's classes. A client of LangChain's own would leave its connections open."""
    with httpx.Client() as client:
        yield {
            "base_url": url,
            "api_key": SecretStr("-"),
            "model": DEFAULT.name,
            "max_retries": 0,
            "http_client": client,
        }


@pytest.mark.parametrize("temperature", [0, 1])
def test_openai_parses_nested_and_optional_fields(url: str, temperature: int) -> None:
    with OpenAI(base_url=url, api_key="-", max_retries=0) as client:
        reply = client.chat.completions.parse(
            model=DEFAULT.name,
            messages=[{"role": "user", "content": TEXT}],
            response_format=Person,
            temperature=temperature,
            max_tokens=96,
            seed=1,
        )
    assert reply.choices[0].finish_reason == "stop"
    assert isinstance(reply.choices[0].message.parsed, Person)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_returns_objects(common: dict[str, Any], method: Any) -> None:
    chat = ChatOpenAI(**common, temperature=0, max_tokens=96)
    assert isinstance(chat.with_structured_output(Person, method=method).invoke(TEXT), Person)


def test_langchain_streams_the_call_of_a_tool(common: dict[str, Any]) -> None:
    chat = ChatOpenAI(**common, temperature=0, max_tokens=96)
    chunks = list(chat.bind_tools([Person], tool_choice="any").stream(TEXT))
    whole: Any = sum(chunks[1:], start=chunks[0])
    (call,) = whole.tool_calls
    assert call["name"] == "Person"
    Person.model_validate(call["args"])


def test_langchain_answers_with_text_if_the_model_may_choose_tools(common: dict[str, Any]) -> None:
    """A call that was demanded and its result are sent back, as agents do it."""
    chat = ChatOpenAI(**common, temperature=0, max_tokens=48)
    called: Any = chat.bind_tools([Person], tool_choice="any").invoke(TEXT)
    (call,) = called.tool_calls
    result = ToolMessage("saved", tool_call_id=call["id"])
    answer: Any = chat.bind_tools([Person]).invoke([HumanMessage(TEXT), called, result])
    assert answer.tool_calls == []
    assert answer.content


def test_langchain_completes_a_batch_in_order(common: dict[str, Any]) -> None:
    llm = LangChainOpenAI(**common, temperature=0, max_tokens=4)
    prompts: list[Any] = ["A flamingo is", "The sky is"]
    assert llm.batch(prompts) == [llm.invoke(prompt) for prompt in prompts]
    assert "".join(llm.stream(prompts[0])) == llm.invoke(prompts[0])


def test_langchain_embeds_texts(common: dict[str, Any]) -> None:
    embeddings = OpenAIEmbeddings(**common, check_embedding_ctx_length=False)
    cat, again = embeddings.embed_documents(["a cat", "a cat"])
    assert cat == pytest.approx(again, abs=1e-5)
    assert len(cat) == DEFAULT.language_model.dim


@pytest.mark.filterwarnings("ignore:The class `OpenAIDecisions` is in beta")
def test_langchain_asks_questions_about_an_image_and_a_conversation(common: dict[str, Any]) -> None:
    decisions = OpenAIDecisions(**common)
    questions: Any = {
        "animal": Choice(instructions="Which animal?", choices={"cat": "It meows.", "dog": None, True: None}),
        "red": Predicate(instructions="Is it red?"),
        "size": Score(instructions="How large is it?", levels=["small", "large"]),
    }
    part: Any = {"type": "image_url", "image_url": {"url": data_url(png("red"))}}
    image = HumanMessage([{"type": "text", "text": "A photograph."}, part])
    for state in ([image], [image, AIMessage("I see a colour."), HumanMessage("Which?")]):
        response = decisions.invoke({"input": state, "questions": questions})
        assert set(response.choices["animal"].probabilities) == {"cat", "dog", True}
        assert 0 < response.predicates["red"].probability < 1
        assert response.scores["size"].legend == {0: "small", 1: "large"}
        assert response.usage.input_tokens
