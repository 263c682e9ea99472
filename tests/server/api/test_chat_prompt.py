"""How a conversation is written as shots and a query, case by case, and which orders of messages are none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from model.config import FlamingoConfig
from model.prompt import EndOfChunk, Media, Segment, Text
from server.api import chat_prompt
from server.api.chat_prompt import find_template, lay_out, read_conversation
from server.errors import InvalidRequest
from server.schemas.chat import ChatRequest
from tests.tiny_models import CONFIGS

CONFIG = CONFIGS["openflamingo"]
A, B = ({"type": "image_id", "image_id": f"img_{name}"} for name in "ab")


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def written(messages: Sequence[dict[str, Any]], template: str = "plain", config: FlamingoConfig = CONFIG) -> str:
    """The prompt as one string, a media as its id."""
    conversation = read_conversation(ChatRequest.model_validate({"messages": messages}).messages)
    turns = [*conversation.shots, conversation.query]
    digests = {s.param: str(getattr(s.part, "image_id", "<url>")).encode() for turn in turns for s in turn.media}
    found = find_template(template, conversation.query, config)
    return "".join(map(spelt, lay_out(conversation, found, digests)))


def spelt(segment: Segment) -> str:
    match segment:
        case Text(text):
            return text
        case Media(digest):
            return f"<{digest.decode()}>"
        case EndOfChunk():
            return "<end>"


def lead(messages: Sequence[dict[str, Any]], template: str = "plain") -> str:
    conversation = read_conversation(ChatRequest.model_validate({"messages": messages}).messages)
    return find_template(template, conversation.query, CONFIG).lead


SHOT = [user(A, "What is this?"), assistant("a cat")]


def test_the_worked_example_is_what_happens() -> None:
    messages = [system("Name the animal."), *SHOT, user("What is this?", B)]
    text = written(messages)
    assert text == "Name the animal.\n<img_a>What is this? a cat<end><img_b>What is this?"
    shown = text.replace("<img_a>", "<image 1>").replace("<img_b>", "<image 2>").replace("<end>", "<|endofchunk|>")
    assert chat_prompt.__doc__ is not None
    assert shown in re.sub("^    ", "", chat_prompt.__doc__, flags=re.MULTILINE)


def test_without_a_token_for_it_a_chunk_ends_with_its_line() -> None:
    config = replace(CONFIG, prompt=replace(CONFIG.prompt, end_of_chunk=""))
    assert written([*SHOT, user(B)], config=config) == "<img_a>What is this? a cat\n<img_b>"


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ((A, "one", B, "two"), "<img_a>one<img_b>two"),
        (("one", A, "two"), "one<img_a>two"),
        (("one", A), "<img_a>one"),
        (("one", A, B), "<img_a><img_b>one"),
        ((A, "one", B), "<img_a><img_b>one"),
        ((A, B), "<img_a><img_b>"),
        (("one", "two"), "onetwo"),
        (({"type": "input_text", "text": "one"},), "one"),
        (({"type": "input_image", "image_url": "data:,"}, "one"), "<<url>>one"),
    ],
)
def test_parts_keep_their_order_but_media_go_before_the_last_text(said: tuple[Any, ...], text: str) -> None:
    assert written([user(*said)]) == text


@pytest.mark.parametrize(
    ("question", "answer", "text"),
    [
        ("Name:", "a cat", "Name: a cat<end>"),
        ("Name: ", "a cat", "Name: a cat<end>"),
        ("Name:", " a cat", "Name: a cat<end>"),
        ("Name:\n", "a cat", "Name:\na cat<end>"),
        ("", "a cat", " a cat<end>"),
    ],
)
def test_one_space_stands_between_question_and_answer(question: str, answer: str, text: str) -> None:
    assert written([user(A, question), assistant(answer), user("x")]) == f"<img_a>{text}x"


def test_the_lead_is_what_the_model_writes_before_its_answer() -> None:
    assert lead([user("Name:")]) == " "
    assert lead([user("Name: ")]) == ""
    assert lead([user("Name:")], "vqa") == ""  # OpenFlamingo's own has no space there


def test_messages_of_one_role_in_a_row_are_one() -> None:
    messages = [system("S"), system("T"), user("a"), user("b", A), assistant("c"), assistant("d"), user("e")]
    assert written(messages) == "S\nT\n<img_a>a\nb c\nd<end>e"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_content_is_a_string_or_parts(role: str) -> None:
    part = {"type": "text", "text": "S"}
    assert written([{"role": role, "content": [part, part]}, {"role": "user", "content": "q"}]) == "SS\nq"


def test_the_templates_of_few_shot_requests_write_turns_their_own_way() -> None:
    messages = [*SHOT, user("And this?", B)]
    assert written(messages, "vqa") == (
        "<img_a>Question:What is this? Short answer:a cat<end>\n<img_b>Question:And this? Short answer:"
    )
    assert written([*SHOT, user(B)], "caption") == "<img_a>Output:a cat<end>\n<img_b>Output:"


def test_a_template_that_is_not_there_or_lacks_something_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        written([user("x")], "chatml")
    assert caught.value.param == "template"
    assert "plain" in caught.value.message
    with pytest.raises(InvalidRequest) as caught:
        written([user(A)], "vqa")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([assistant("a"), user("q")], "messages[0].role"),
        ([user("q"), system("s"), user("q")], "messages[1].role"),
        ([user("q"), assistant("a")], "messages[1].role"),
        ([system("s")], "messages[0].role"),
    ],
)
def test_an_order_that_is_no_conversation_is_refused(messages: list[dict[str, Any]], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        written(messages)
    assert caught.value.param == param
