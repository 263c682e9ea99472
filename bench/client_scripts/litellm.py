"""Completions, decisions and embeddings by LiteLLM: `-m bench.client_scripts.litellm URL MODEL IMAGE`."""

from __future__ import annotations

import sys
from typing import Any

import litellm

from bench.client_scripts.habits import expect, report

TEXT = "A flamingo is"
URL, MODEL, IMAGE = sys.argv[1:4]
TARGET: dict[str, Any] = {"api_base": f"{URL}/v1", "api_key": "-", "max_retries": 0}
GREEDY: dict[str, Any] = {**TARGET, "temperature": 0, "max_tokens": 8}


def chat(content: Any, **fields: Any) -> Any:
    messages = [{"role": "user", "content": content}]
    return litellm.completion(model=f"openai/{MODEL}", messages=messages, **GREEDY, **fields)


def complete_text(**fields: Any) -> Any:
    return litellm.text_completion(model=f"text-completion-openai/{MODEL}", prompt=TEXT, **GREEDY, **fields)


def answer_chat() -> str:
    reply = chat(TEXT)
    expect(reply.choices[0].finish_reason in ("stop", "length"), reply)
    return nonempty(reply.choices[0].message.content)


def stream_chat() -> str:
    chunks = list(chat(TEXT, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    expect(text == chat(TEXT).choices[0].message.content, f"streamed {text!r}")
    return f"{len(chunks)} chunks, the text of the whole answer"


def answer_with_image() -> str:
    reply = chat(parts())
    num_tokens = reply.usage.prompt_tokens - chat(TEXT).usage.prompt_tokens
    expect(num_tokens > 0, f"{num_tokens} tokens of the image")
    return nonempty(reply.choices[0].message.content)


def stream_with_image() -> str:
    chunks = list(chat(parts(), stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    expect(text == chat(parts()).choices[0].message.content, f"streamed {text!r}")
    return f"{len(chunks)} chunks, the text of the whole answer"


def parts() -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": TEXT}]


def embed() -> str:
    reply = litellm.embedding(model=f"openai/{MODEL}", input=["a cat", "a dog"], **TARGET)
    vectors = [item["embedding"] for item in reply.data]
    expect(len(vectors) == 2 and vectors[0] != vectors[1], vectors)
    return f"2 vectors of {len(vectors[0])} numbers"


def decide() -> str:
    questions = [
        {"type": "predicate", "name": "bird", "instructions": "Is it a bird?"},
        {"type": "choice", "instructions": "Which?", "choices": [{"value": "flamingo"}, {"value": False}]},
        {"type": "score", "instructions": "How large is it?", "levels": [{"label": "small"}, {"label": "large"}]},
    ]
    image = {"role": "user", "content": [{"type": "input_image", "image_url": IMAGE}]}
    reply = litellm.decisions(model=f"openai/{MODEL}", input=[image], questions=questions, **TARGET)
    predicate, choice, score = reply.answers
    expect((predicate.name, 0 < predicate.probability < 1) == ("bird", True), predicate)
    expect([item.value for item in choice.probabilities] == ["flamingo", False], choice)
    expect(score.score == score.probabilities[1].probability, score)
    return f"{predicate.type}, {choice.type} and {score.type} about an image"


def answer_text() -> str:
    return nonempty(complete_text().choices[0].text)


def stream_text() -> str:
    chunks = list(complete_text(stream=True))
    text = "".join(chunk.choices[0].text or "" for chunk in chunks)
    expect(text == complete_text().choices[0].text, f"streamed {text!r}")
    return f"{len(chunks)} chunks, the text of the whole answer"


def nonempty(text: str) -> str:
    expect(bool(text), "the answer is empty")
    return repr(text)


if __name__ == "__main__":
    report(
        {
            "completion": answer_chat,
            "completion, streamed": stream_chat,
            "completion with an image": answer_with_image,
            "completion with an image, streamed": stream_with_image,
            "decisions": decide,
            "embedding": embed,
            "text_completion": answer_text,
            "text_completion, streamed": stream_text,
        }
    )
