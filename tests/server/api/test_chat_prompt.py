"""A conversation is written as shots and a query; impossible orders of messages are refused."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from model.config import FlamingoConfig
from model.prompt import EndOfChunk, Media, Segment, Text
from server.api import chat_prompt
from server.api.chat_prompt import lay_out, read_conversation, template_of
from server.errors import InvalidRequest
from server.schemas.generation import ChatRequest
from tests.tiny_models import CONFIGS

CONFIG = CONFIGS["openflamingo"]
A, B = ({"type": "image_id", "image_id": f"img_{name}"} for name in "ab")


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def write(messages: Sequence[dict[str, Any]], template: str | None = "plain", config: FlamingoConfig = CONFIG) -> str:
    """Return the prompt as one string with the ids of its media."""
    conversation = read_conversation(ChatRequest.model_validate({"messages": messages}).messages)
    turns = [*conversation.shots, conversation.query]
    digests = {s.param: str(getattr(s.part, "image_id", "<url>")).encode() for turn in turns for s in turn.media}
    segments = lay_out(conversation, template_of(template, conversation, config), digests)
    return "".join(map(spell, segments))


def spell(segment: Segment) -> str:
    match segment:
        case Text(text):
            return text
        case Media(digest):
            return f"<{digest.decode()}>"
        case EndOfChunk():
            return "<end>"


def lead(messages: Sequence[dict[str, Any]], template: str = "plain") -> str:
    conversation = read_conversation(ChatRequest.model_validate({"messages": messages}).messages)
    return template_of(template, conversation, CONFIG).lead


def named(message: dict[str, Any], name: str) -> dict[str, Any]:
    return {**message, "name": name}


SHOT = [user(A, "What is this?"), assistant("a cat")]


def test_the_documented_example_is_correct() -> None:
    messages = [system("Name the animal."), *SHOT, user("What is this?", B)]
    text = write(messages)
    assert text == "Name the animal.\n<img_a>What is this? a cat<end><img_b>What is this?"
    documented = text.replace("<img_a>", "<image 1>").replace("<img_b>", "<image 2>").replace("<end>", "<|endofchunk|>")
    assert chat_prompt.__doc__ is not None
    assert documented in re.sub("^    ", "", chat_prompt.__doc__, flags=re.MULTILINE)


def call(*arguments: str) -> dict[str, Any]:
    calls = [
        {"id": f"call_{text}", "type": "function", "function": {"name": "f", "arguments": text}} for text in arguments
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(arguments: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call_{arguments}", "content": content}


def test_a_call_is_an_answer_and_with_its_result_a_part_of_the_question() -> None:
    assert write([user(A, "a"), call("{}"), user(B, "b")]) == "<img_a>a {}<end><img_b>b"
    results = [call("{1}", "{2}"), result("{2}", "two"), result("{1}", "one")]
    assert write([user("b", B), *results]) == "b<img_b>\n{1}\n{2}\ntwo\none"
    assert write([user("b"), *results, user("c")]) == "b\n{1}\n{2}\ntwo\none\nc"
    assert write([user("b"), *results, assistant("d"), user("c")]) == "b\n{1}\n{2}\ntwo\none d<end>c"


def test_without_an_end_of_chunk_token_a_line_break_ends_a_shot() -> None:
    config = replace(CONFIG, prompt=replace(CONFIG.prompt, end_of_chunk=""))
    assert write([*SHOT, user(B)], config=config) == "<img_a>What is this? a cat\n<img_b>"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ((A, "one", B, "two"), "<img_a>one<img_b>two"),
        (("one", A, "two"), "one<img_a>two"),
        (("one", A), "<img_a>one"),
        (("one", A, B), "<img_a><img_b>one"),
        ((A, "one", B), "<img_a><img_b>one"),
        ((A, B), "<img_a><img_b>"),
        (("one", "two"), "onetwo"),
        (({"type": "input_text", "text": "one"},), "one"),
        (({"type": "input_image", "image_url": "data:,", "detail": "original"}, "one"), "<<url>>one"),
    ],
)
def test_parts_keep_their_order_but_media_precede_the_last_text(content: tuple[Any, ...], text: str) -> None:
    assert write([user(*content)]) == text


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
def test_one_space_separates_question_and_answer(question: str, answer: str, text: str) -> None:
    assert write([user(A, question), assistant(answer), user("x")]) == f"<img_a>{text}x"


def test_the_lead_is_the_text_that_the_model_writes_before_its_answer() -> None:
    assert lead([user("Name:")]) == " "
    assert lead([user("Name: ")]) == ""
    assert lead([user("Name:")], "vqa") == ""  # OpenFlamingo's template has no space there


def test_consecutive_messages_of_one_role_are_joined() -> None:
    messages = [system("S"), system("T"), user("a"), user("b", A), assistant("c"), assistant("d"), user("e")]
    assert write(messages) == "S\nT\n<img_a>a\nb c\nd<end>e"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_content_is_a_string_or_parts(role: str) -> None:
    part = {"type": "text", "text": "S"}
    assert write([{"role": role, "content": [part, part]}, {"role": "user", "content": "q"}]) == "SS\nq"


def test_templates_of_few_shot_requests_may_write_turns() -> None:
    messages = [*SHOT, user("And this?", B)]
    assert write(messages, "vqa") == (
        "<img_a>Question:What is this? Short answer:a cat<end>\n<img_b>Question:And this? Short answer:"
    )
    assert write([*SHOT, user(B)], "caption") == "<img_a>Output:a cat<end>\n<img_b>Output:"


@pytest.mark.parametrize(
    ("messages", "is_vqa"),
    [
        ([user(A, "q?")], True),
        ([system("s"), user("q?", A)], True),
        ([user(A, "q?"), user("And r?")], True),
        ([user(A, "q?"), assistant("a"), user(B, "r?")], False),
        ([user("q?")], False),
        ([user(A)], False),
        ([user(A, " ")], False),
        ([user(A, B, "q?")], False),
        ([user(A, "Describe it.")], True),
        ([user(A, "Question: q? Answer:")], False),
        ([user(A, "Output: ")], False),
        ([user(A, "问题：q? 答案：")], False),
        ([user("q?", A, "\n")], True),
        ([user("Compare ", A, " with a flamingo.")], False),
    ],
)
def test_a_question_about_one_image_that_follows_no_answer_has_the_template_vqa(
    messages: list[dict[str, Any]], is_vqa: bool
) -> None:
    """After a bare question, a model often ends its answer at once."""
    assert write(messages, None) == write(messages, "vqa" if is_vqa else "plain")


def test_an_unknown_template_or_a_missing_value_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        write([user("x")], "chatml")
    assert caught.value.param == "template"
    assert "unknown template 'chatml', known are plain, " in caught.value.message
    with pytest.raises(InvalidRequest) as caught:
        write([user(A)], "vqa")
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
def test_an_error_names_the_message_with_an_impossible_role(messages: list[dict[str, Any]], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        write(messages)
    assert caught.value.param == param


def test_one_name_for_each_role_changes_nothing() -> None:
    messages = [system("Name it."), *SHOT, user(B, "And this?")]
    names = {"system": "rules", "user": "ann", "assistant": "bot"}
    assert write([named(message, names[message["role"]]) for message in messages]) == write(messages)
    assert write([named(messages[0], "rules"), *messages[1:]]) == write(messages)


@pytest.mark.parametrize(
    ("messages", "index", "names"),
    [
        ([named(user("x"), "ann"), named(user("y"), "ben")], 1, "'ann' and 'ben'"),
        ([named(user("x"), "ann"), assistant("y"), user("z")], 2, "'ann' and none"),
        ([user("x"), named(assistant("y"), "bot"), user("z"), assistant("y"), user("z")], 3, "'bot' and none"),
        ([named(system("x"), "a"), named({"role": "developer", "content": "y"}, "b"), user("z")], 1, "'a' and 'b'"),
    ],
)
def test_names_that_tell_participants_apart_are_refused(messages: list[dict[str, Any]], index: int, names: str) -> None:
    with pytest.raises(InvalidRequest, match=f"have the names {names}") as refusal:
        write(messages)
    assert refusal.value.param == f"messages[{index}].name"


def test_the_time_to_read_a_turn_grows_with_its_length_alone() -> None:
    """Texts that are appended to each other one by one are copied once for each later one: here 8 GB."""
    text, number = "a" * 1000, 4000
    turns = [user(*[text] * number), *(assistant(text) for _ in range(1000)), *(user(text) for _ in range(40))]
    messages = ChatRequest.model_validate({"messages": turns}).messages
    started = time.process_time()
    conversation = read_conversation(messages)
    assert time.process_time() - started < 0.5
    assert conversation.shots[0].content == [text * number]
    assert conversation.shots[0].answer == "\n".join([text] * 1000)
    assert conversation.query.content == ["\n".join([text] * 40)]
