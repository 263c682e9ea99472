"""Objects of a pydantic class by instructor, without retries: `-m bench.client_scripts.instructor URL MODEL IMAGE`."""

from __future__ import annotations

import sys
from typing import Any, Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field

from bench.client_scripts.habits import expect, report

TEXT = "John Smith, 42, lives at 12 Main Street, Springfield."
URL, MODEL = sys.argv[1:3]


class Address(BaseModel):
    street: str
    city: str
    kind: Literal["home", "work"]


class Person(BaseModel):
    """A person, with nested and optional fields."""

    name: str
    age: int
    email: str | None = None
    address: Address | None = None
    notes: list[str] = Field(default_factory=list)


def extract(mode: instructor.Mode) -> str:
    client = instructor.from_openai(OpenAI(base_url=f"{URL}/v1", api_key="-", max_retries=0), mode=mode)
    requests: list[Any] = []
    client.on("completion:kwargs", lambda *_, **fields: requests.append(fields))
    person = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": TEXT}],
        response_model=Person,
        max_retries=0,
        temperature=0,
        max_tokens=128,
    )
    expect(isinstance(person, Person), person)
    expect(len(requests) == 1, f"{len(requests)} requests")
    return f"Person(name={person.name!r}, age={person.age}, …)"


if __name__ == "__main__":
    report(
        {
            "response model, JSON_SCHEMA": lambda: extract(instructor.Mode.JSON_SCHEMA),
            "response model, TOOLS": lambda: extract(instructor.Mode.TOOLS),
        }
    )
