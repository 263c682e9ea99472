"""Attacks by a single legal request, or many of one kind: too much text, too much work, extreme numbers."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

from bench import mixture
from bench.attacks.attack import Attack, Session, repeated
from bench.target import JSON_HEADERS, Request, image_part, jpeg, post, text_request

MB = 2**20
# before all other requests: only settings or a role permit it
MOST_URGENT = -(2**31)
LONG = 7900
LARGE_ENUM = 400_000
DEADLINE = 2.0
# seconds for a step of the model on a busy machine
DEADLINE_SLACK = 3.0
WORDS = "a flamingo stands in the water and waits for the next tide "


def text(num_bytes: int, seed: int = 0) -> str:
    """Return text that has many tokens and is in no cache."""
    return f"{seed} " + WORDS * (num_bytes // len(WORDS))


def _completion(**fields: Any) -> Request:
    return post("/v1/completions", **{"prompt": "a", **fields})


def _extremes() -> Attack:
    bodies: tuple[dict[str, Any], ...] = (
        {"repetition_penalty": 1e-38},
        {"repetition_penalty": 5e-324, "logprobs": 0},
        {"temperature": 1e-38, "top_p": 0.9},
        {"temperature": 1e-40, "top_k": 5, "n": 2},
        {"temperature": 5e-324, "min_p": 1.0},
        {"temperature": 1.0, "top_p": 5e-324},
    )
    return Attack(
        name="extreme numbers",
        severity="critical",
        run=repeated(*(lambda fields=fields: _completion(**fields) for fields in bodies)),
    )


def _parts(num: int) -> Request:
    return _completion(prompt=[{"type": "text", "text": "a"}] * num)


def _long_prompt(session: Session, **fields: Any) -> None:
    seed = random.randrange(10**9)
    session.send(_completion(prompt=text(4 * LONG, seed)[: 4 * LONG], max_tokens=1, **fields))


def _chat_of_parts(num: int) -> Request:
    content = [{"type": "text", "text": "a bird "}] * num
    return post("/v1/chat/completions", messages=[{"role": "user", "content": content}], max_tokens=1)


def _new_examples(num: int, **fields: Any) -> Request:
    return post("/v1/support_sets", examples=[fields] * num, ttl_seconds=60)


def _many_questions() -> Request:
    choices = [{"value": str(number)} for number in range(68)]
    questions = [{"type": "choice", "instructions": "Which?", "choices": choices}] * 60
    return post("/v1/decisions", input="A cup.", questions=questions)


def _decisions_with_long_instructions() -> Request:
    """Return a request whose prompt would repeat 8 MB for each of 1,000 examples."""
    question = {"type": "choice", "instructions": "a" * 8 * MB, "choices": [{"value": "cat"}, {"value": "dog"}]}
    shots = [{"question": "Tail?", "label": "cat"}] * 1000
    return post("/v1/decisions", input="A cup.", questions=[question], shots=shots)


def _repeated_prompts() -> Request:
    """Return a request that streams 16 answers, each of which repeats a long prompt with its log-probabilities."""
    fields = {"n": 16, "temperature": 1.0, "echo": True, "logprobs": 15, "max_tokens": 1, "stream": True}
    return _completion(prompt=[5] * LONG, **fields)


def _repetitive_stop_strings() -> Request:
    """Return a request whose answer seems to begin stop strings all the time."""
    stop = ["ab" * 512, *("c" * (1024 - i) for i in range(15))]
    return _completion(**_regex("(ab){500}c"), stop=stop, max_tokens=1000)


def _new_templates(session: Session) -> None:
    """Compute the pages of a support set under many templates at once."""
    path = f"/v1/support_sets/{mixture.SUPPORT_SET}/warm"
    templates = [{**mixture.TEMPLATE, "separator": str(random.random())} for _ in range(200)]
    session.send_all([post(path, template=template) for template in templates], 16)


def _few_shot_bomb() -> Request:
    """Return a small request whose template repeats a text many times."""
    return post(
        "/v1/fewshot/completions",
        shots=[{"text": "flamingo " * 1000}] * 64,
        query={"text": "?"},
        template={"shot": "{text}" * 2500},
        max_tokens=1,
    )


def _permutations() -> Request:
    return post(
        "/v1/classify",
        shots=[{"question": f"{i} + {i}?", "text": str(i)} for i in range(200)],
        query={"question": "1 + 1?"},
        template={"shot": "{question} {answer}\n"},
        candidates=[str(i) for i in range(1000)],
        permutations=24,
        calibration="contextual",
    )


def _enum(num: int) -> dict[str, Any]:
    return {"structured_outputs": {"json": {"enum": [f"value {i}" for i in range(num)]}}}


def _schema(**schema: Any) -> dict[str, Any]:
    return {"structured_outputs": {"json": schema}}


def _regex(pattern: str) -> dict[str, Any]:
    return {"structured_outputs": {"regex": pattern}}


def _nested_schema(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema, "minItems": 1}
    return {"structured_outputs": {"json": schema}}


def _nested_body(depth: int) -> Request:
    body = b'{"prompt":"a","structured_outputs":{"json":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}}"
    return Request(path="/v1/completions", body=body, headers=JSON_HEADERS)


def _priorities(session: Session) -> None:
    requests = [text_request(64, priority=MOST_URGENT, prompt=f"{i} birds") for i in range(100)]
    session.send_all(requests, 100)


def _many_answers(session: Session) -> None:
    fields = {"n": 16, "temperature": 1.0, "stream": True}
    session.send_all([text_request(8000, prompt=f"{i} birds", **fields) for i in range(40)], 40)


def _pictures(num: int) -> list[dict[str, Any]]:
    return [image_part(jpeg(random.randrange(10**9))) for _ in range(num)]


def _inspection(session: Session) -> None:
    session.send(post("/v1/inspect", prompt=_pictures(60), answer=" a bird"))


def _evaluations(session: Session) -> None:
    path = f"/v1/support_sets/{mixture.SUPPORT_SET}/evaluate"
    session.send_all([post(path, k=[1, 2, 4], template=mixture.TEMPLATE) for _ in range(1000)], 4)


def _text_as_json() -> Request:
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    return Request(path="/v1/completions", body=body, headers={"Content-Type": "text/plain"})


def _form_of_many_parts() -> Request:
    part = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    return Request(path="/v1/images", body=part * 200_000 + b"--b--\r\n", headers=headers)


def _form_in_punycode() -> Request:
    """Return a form whose charset takes a time that grows with the square of a field's length to decode."""
    part = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"a" * 2**20 + b"\r\n"
    headers = {"Content-Type": "multipart/form-data; charset=punycode; boundary=b"}
    return Request(path="/v1/images", body=part + b"--b--\r\n", headers=headers)


def _scores(seed: int, num_candidates: int, length: int) -> Request:
    candidates = [[(seed + i) % 250 + 4] * length for i in range(num_candidates)]
    return post("/v1/score", prompt="a", candidates=candidates)


def _long_with_deadline() -> Request:
    request = text_request(1900, n=16, temperature=1.0)
    return replace(request, headers={**request.headers, "X-Request-Timeout": str(DEADLINE)})


ATTACKS = (
    _extremes(),
    Attack(
        name="long answers with a deadline",
        severity="high",
        run=repeated(_long_with_deadline),
        max_seconds=DEADLINE + DEADLINE_SLACK,
    ),
    Attack(name="8 MB of text", severity="critical", run=repeated(lambda: _completion(prompt=text(8 * MB)))),
    Attack(
        name="8 MB to tokenize",
        severity="critical",
        run=repeated(lambda: post("/tokenize", prompt=text(8 * MB)), num_connections=1),
    ),
    Attack(name="800,000 text parts", severity="critical", run=repeated(lambda: _parts(800_000))),
    Attack(
        name="40 MB of text to embed",
        severity="critical",
        run=repeated(lambda: post("/v1/embeddings", input=[text(MB, i) for i in range(40)])),
    ),
    Attack(name="template that repeats a text", severity="critical", run=repeated(_few_shot_bomb)),
    Attack(
        name="field with a name of 8 MB",
        severity="critical",
        run=repeated(lambda: _completion(**{"x" * (8 * MB): 1})),
        is_refused=True,
    ),
    Attack(
        name="chat of 30,000 text parts", severity="high", run=repeated(lambda: _chat_of_parts(30_000)), is_refused=True
    ),
    Attack(name="chat of 8,000 text parts", severity="high", run=repeated(lambda: _chat_of_parts(8000))),
    Attack(
        name="500,000 parts that are no parts, and 200,000 empty examples",
        severity="critical",
        run=repeated(
            lambda: post("/v1/chat/completions", messages=[{"role": "user", "content": [0] * 500_000}]),
            lambda: _new_examples(200_000),
        ),
        is_refused=True,
    ),
    Attack(name="10,000 new examples", severity="high", run=repeated(lambda: _new_examples(10_000, text="a"))),
    Attack(name="60 questions with 68 choices", severity="high", run=repeated(_many_questions)),
    Attack(
        name="1,000 examples under long instructions", severity="high", run=repeated(_decisions_with_long_instructions)
    ),
    Attack(name="stream of 16 repeated prompts", severity="high", run=repeated(_repeated_prompts)),
    Attack(name="stop strings that repeat themselves", severity="medium", run=repeated(_repetitive_stop_strings)),
    Attack(
        name="pages under 200 templates",
        severity="high",
        run=_new_templates,
        prepare=mixture.prepare,
        clean=mixture.clean,
    ),
    Attack(
        name="10,000,000 token ids",
        severity="high",
        run=repeated(lambda: _completion(prompt=[5] * 10_000_000)),
    ),
    Attack(
        name="1,024 candidates of 2,000 tokens",
        severity="high",
        run=repeated(lambda: _scores(random.randrange(10**6), 1024, 2000)),
    ),
    Attack(
        name="1,024 texts of 8,000 tokens",
        severity="high",
        run=repeated(lambda: post("/v1/embeddings", input=[[i % 200 + 5] * 8000 for i in range(1024)])),
    ),
    Attack(name="24 orders of 1,000 candidates", severity="high", run=repeated(_permutations)),
    Attack(name="attention to 60 images", severity="high", run=_inspection),
    Attack(name="8,000-token prompts", severity="high", run=_long_prompt),
    Attack(
        name="8,000-token prompts with log-probabilities",
        severity="high",
        run=lambda session: _long_prompt(session, prompt_logprobs=20),
    ),
    Attack(
        name="enum of 50,000 values, 16 answers",
        severity="high",
        run=repeated(lambda: _completion(**_enum(50_000), n=16, temperature=1.0)),
    ),
    Attack(
        name="texts of 60,000 characters without an alternative, 16 answers",
        severity="high",
        run=repeated(
            lambda: _completion(**_schema(const="a" * 60_000), n=16, temperature=1.0, max_tokens=200),
            lambda: _completion(**_regex("[ab]c{60000}"), n=16, temperature=1.0, max_tokens=200),
        ),
    ),
    Attack(name="enum of 400,000 values", severity="high", run=repeated(lambda: _completion(**_enum(LARGE_ENUM)))),
    Attack(
        name="expressions that explode",
        severity="high",
        run=repeated(
            lambda: _completion(**_regex("(((a{1,100}){1,100}){1,100}){1,100}")),
            lambda: _completion(**_regex("(.*a){1,200}b" + ".*c" * 50)),
            lambda: _completion(**_regex("(a|b|ab)*" * 300)),
        ),
    ),
    Attack(
        name="nested schemas",
        severity="high",
        run=repeated(
            lambda: _completion(**_nested_schema(60)), lambda: _nested_body(100), lambda: _nested_body(1_000_000)
        ),
    ),
    Attack(
        name="integers next to the smallest of 64 bits",
        severity="critical",
        # llguidance overflows its stack for a range that begins there
        run=repeated(
            lambda: _completion(**_schema(type="integer", minimum=-(2**63), maximum=2**63 - 1)),
            lambda: _completion(**_schema(const=1 - 2**63)),
        ),
    ),
    Attack(
        name="schema with a pattern of 60,000 characters, or 800 patterns of names",
        severity="critical",
        # their compilation takes seconds and gigabytes, or hours, in the one thread that compiles grammars
        run=repeated(
            lambda: _completion(**_schema(type="string", pattern="^" + "a?" * 30_000 + "$")),
            lambda: _completion(**_schema(patternProperties={f"^field_{i}_": {} for i in range(800)})),
        ),
        is_refused=True,
    ),
    Attack(name="100 requests of the most urgent priority", severity="high", run=_priorities, is_refused=True),
    Attack(name="40 times 16 answers of 8,000 tokens", severity="high", run=_many_answers),
    Attack(
        name="1,000 evaluations",
        severity="medium",
        run=_evaluations,
        prepare=mixture.prepare,
        clean=mixture.clean,
    ),
    Attack(
        name="1,000,000 token ids to text",
        severity="medium",
        run=repeated(lambda: post("/detokenize", tokens=list(range(4, 260)) * 4000)),
    ),
    Attack(name="form of 200,000 parts", severity="medium", run=repeated(_form_of_many_parts)),
    Attack(name="form in punycode", severity="critical", run=repeated(_form_in_punycode), is_refused=True),
    Attack(name="JSON sent as text", severity="low", run=repeated(_text_as_json), is_refused=True),
)
