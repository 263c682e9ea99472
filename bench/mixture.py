"""A random mixture of small requests to every route that does work, for commands that send very many of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.driver import BenchFailed
from bench.target import Request, Target, get, image_part, image_request, jpeg, post, text_request

SUPPORT_SET = "mixture"
TEMPLATE = {"shot": "{media}{question} {answer}\n"}
NUM_EXAMPLES = 6
COLOURS = ("red", "green", "blue")
# few of the pictures are new to the server
NUM_PICTURES = 200


def prepare(target: Target, name: str = SUPPORT_SET) -> None:
    """Store the support set that the requests refer to. Raises `BenchFailed`."""
    examples = [
        {"id": f"e{i}", "media": [image_part(jpeg(i))], "question": "colour?", "label": COLOURS[i % len(COLOURS)]}
        for i in range(NUM_EXAMPLES)
    ]
    answer = target.send(post("/v1/support_sets", name=name, examples=examples))
    if answer.status not in (201, 200, 409):
        raise BenchFailed(f"the support set was not stored: {answer.status} {answer.body[:500]!r}{answer.error}")


def clean(target: Target) -> None:
    """Cancel and delete the evaluations and support sets that clients have left."""
    for path in ("/v1/evaluations", "/v1/support_sets"):
        while entries := target.send(get(f"{path}?limit=100")).json()["data"]:
            for entry in entries:
                target.send(post(f"{path}/{entry['id']}/cancel") if "evaluations" in path else get("/health/live"))
                target.send(Request(method="DELETE", path=f"{path}/{entry['id']}"))


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of request, with its weight in the mixture."""

    name: str
    make: Callable[[random.Random], Request]
    weight: float = 1.0


def draw(rng: random.Random) -> tuple[str, Request]:
    """Return the name and the request of a kind."""
    kind = rng.choices(KINDS, [kind.weight for kind in KINDS])[0]
    return kind.name, kind.make(rng)


def _max_tokens(rng: random.Random) -> int:
    return rng.choice((0, 1, 4, 16, 64))


def _picture(rng: random.Random) -> dict[str, Any]:
    return image_part(jpeg(rng.randrange(NUM_PICTURES)))


def _query(rng: random.Random) -> dict[str, Any]:
    return {"media": [_picture(rng)], "question": f"colour {rng.randrange(100)}?"}


def _completion(rng: random.Random) -> Request:
    fields: dict[str, Any] = rng.choice(
        (
            {},
            {"stream": True, "stream_options": {"include_usage": True}},
            {"n": 3, "temperature": 1.0, "stream": rng.random() < 0.5},
            {"logprobs": 5, "prompt_logprobs": 1},
            {"structured_outputs": {"choice": list(COLOURS)}},
            {"use_beam_search": True, "temperature": 0.0},
            {"priority": rng.randrange(-3, 3)},
        )
    )
    prompt = f"{rng.randrange(20)} flamingos are"
    return text_request(_max_tokens(rng), prompt=prompt, **fields)


def _chat(rng: random.Random) -> Request:
    content = [_picture(rng), {"type": "text", "text": "What is it?"}]
    return post(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": content}],
        max_tokens=_max_tokens(rng),
        stream=rng.random() < 0.5,
    )


def _few_shot(rng: random.Random) -> Request:
    return post(
        "/v1/fewshot/completions",
        examples={"support_set": SUPPORT_SET, "k": 3, "strategy": rng.choice(("first", "random", "rices_image"))},
        query=_query(rng),
        template=TEMPLATE,
        max_tokens=_max_tokens(rng),
    )


def _classify(rng: random.Random) -> Request:
    examples = {"support_set": SUPPORT_SET, "k": 2}
    return post("/v1/classify", examples=examples, query=_query(rng), candidates=list(COLOURS), template=TEMPLATE)


def _score(rng: random.Random) -> Request:
    candidates = [f" {rng.randrange(1000)}" for _ in range(rng.randrange(1, 40))]
    return post("/v1/score", prompt=[_picture(rng), {"type": "text", "text": " It is"}], candidates=candidates)


def _embedding(rng: random.Random) -> Request:
    texts = [f"flamingo {rng.randrange(1000)}" for _ in range(5)]
    return post("/v1/embeddings", input=texts if rng.random() < 0.5 else [_picture(rng), _picture(rng)])


def _inspection(rng: random.Random) -> Request:
    return post("/v1/inspect", prompt=[_picture(rng), {"type": "text", "text": " a picture"}], answer=" of a bird")


def _set_name(rng: random.Random) -> str:
    return f"left-{rng.randrange(10_000)}"


def _new_set(rng: random.Random) -> Request:
    examples = [{"media": [_picture(rng)], "text": "a"}, {"text": "b", "question": "?"}]
    return post("/v1/support_sets", name=_set_name(rng), examples=examples, ttl_seconds=600)


def put_examples(rng: random.Random) -> Request:
    example = {"id": f"e{rng.randrange(NUM_EXAMPLES)}", "question": "colour?", "label": "red"}
    return post(f"/v1/support_sets/{SUPPORT_SET}/examples", examples=[example | {"media": [_picture(rng)]}])


def _search(rng: random.Random) -> Request:
    return post(f"/v1/support_sets/{SUPPORT_SET}/search", query=_query(rng), k=3)


def _warm(rng: random.Random) -> Request:
    return post(f"/v1/support_sets/{SUPPORT_SET}/warm", wait=rng.random() < 0.5)


def _evaluation(rng: random.Random) -> Request:
    path = f"/v1/support_sets/{SUPPORT_SET}/evaluate"
    return post(path, k=[1], strategies=["first"], max_queries=2, template=TEMPLATE)


def _upload(rng: random.Random) -> Request:
    headers = {"Content-Type": "image/jpeg"}
    return Request(path="/v1/images", body=jpeg(rng.randrange(NUM_PICTURES)), headers=headers)


def _reading(rng: random.Random) -> Request:
    paths = ("/v1/support_sets", "/v1/images", f"/v1/support_sets/{SUPPORT_SET}/examples", "/metrics", "/openapi.json")
    return get(rng.choice(paths))


KINDS = (
    Kind("completion", _completion, 5),
    Kind("completion of an image", lambda rng: image_request(rng.randrange(NUM_PICTURES), _max_tokens(rng)), 3),
    Kind("chat", _chat, 2),
    Kind("few-shot", _few_shot, 2),
    Kind("classify", _classify, 2),
    Kind("score", _score, 2),
    Kind("embeddings", _embedding, 2),
    Kind("inspect", _inspection),
    Kind("new set", _new_set),
    Kind("put examples", put_examples),
    Kind("search", _search),
    Kind("warm", _warm),
    Kind("evaluate", _evaluation, 0.2),
    Kind("upload", _upload),
    Kind("tokenize", lambda rng: post("/tokenize", prompt="a flamingo " * rng.randrange(1, 200))),
    Kind("reading", _reading),
)
