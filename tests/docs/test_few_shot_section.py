"""The sections on few-shot completions and search list the fields of the schemas, and their worked example is valid."""

from __future__ import annotations

import json
import re
from typing import get_args

import pytest
from pydantic import BaseModel

from model.prompt import EndOfChunk, Media, Text
from server.fewshot.shots import DEFAULT_ORDER
from server.fewshot.templates import OPENFLAMINGO, PAPER, Shot
from server.schemas.base import read
from server.schemas.fewshot import (
    ExamplesFields,
    FewShotCompletionRequest,
    FewShotFields,
    Order,
    QueryFields,
    SearchRequest,
    ShotFields,
    Strategy,
    TemplateFields,
)
from tests.server.test_docs import API, names, rows, section

SECTION = section(API, "Few-shot completions")
SEARCH = section(API, "Search")


def table(head: str, text: str = SECTION) -> list[list[str]]:
    """Return the rows of the table whose first column has this head."""
    _, rest = re.split(rf"\n\| {re.escape(head)} \|.*\n\|---", text)
    return rows(rest.partition("\n\n")[0])


def first_names(table_rows: list[list[str]]) -> list[str]:
    return [name for row in table_rows for name in names(row[0])]


def code_block(language: str) -> str:
    (block,) = re.findall(rf"```{language}\n(.*?)\n```", SECTION, flags=re.DOTALL)
    return str(block)


@pytest.mark.parametrize(
    ("head", "schema", "aliases"),
    [
        ("field", FewShotFields, set()),
        ("`query` field", QueryFields, set()),
        ("`shots` field", ShotFields, {"answer"}),
        ("`examples` field", ExamplesFields, set()),
        ("`template` field", TemplateFields, set()),
    ],
)
def test_every_field_is_in_its_table(head: str, schema: type[BaseModel], aliases: set[str]) -> None:
    documented = first_names(table(head))
    assert sorted(documented) == sorted(schema.model_fields.keys() | aliases)


def test_every_strategy_is_listed_with_its_default_order() -> None:
    documented = {names(strategy)[0]: names(order)[0] for strategy, order, _ in table("`strategy`")}
    assert list(documented) == list(get_args(Strategy))
    assert documented == DEFAULT_ORDER


def test_every_order_is_listed() -> None:
    assert sorted(first_names(table("`order`"))) == sorted(get_args(Order))


def test_the_listed_templates_are_the_built_in_ones() -> None:
    documented = {names(name)[0]: (openflamingo, paper) for name, openflamingo, paper in table("`template`")}
    assert documented.keys() == {template.name for template in PAPER}
    for openflamingo, paper in zip(OPENFLAMINGO, PAPER, strict=True):
        first, second = documented[openflamingo.name]
        assert names(first) == [openflamingo.shot]
        assert ("a line break between shots" in first) == (openflamingo.separator == "\n")
        assert names(second) == [paper.shot]


def test_the_worked_example_is_a_valid_request_and_gives_the_documented_prompt() -> None:
    command, prompt, response = code_block("sh"), code_block("text"), json.loads(code_block("json"))
    fields = read(FewShotCompletionRequest, command.partition(" -d '")[2].rstrip("'").encode())
    assert fields.examples is not None
    assert response["fewshot"]["strategy"] == fields.examples.strategy
    scores = [shot["score"] for shot in response["fewshot"]["shots"]]
    assert len(scores) == fields.examples.k
    assert scores == sorted(scores)
    (template,) = [template for template in PAPER if template.name == fields.template]
    texts = re.findall(r"Output: (.*?)<\|endofchunk\|>", prompt)
    assert len(texts) == fields.examples.k
    segments = template.render([Shot(media=(b"",), text=text) for text in texts], Shot(media=(b"",)))
    markers = {Media: "<image>", EndOfChunk: "<|endofchunk|>"}
    written = [segment.text if isinstance(segment, Text) else markers[type(segment)] for segment in segments]
    assert "".join(written) == prompt


def test_the_fields_of_a_search_are_listed() -> None:
    documented = {names(name)[0]: default for name, default, _ in table("field", SEARCH)}
    assert documented.keys() == SearchRequest.model_fields.keys()
    assert documented["k"] == str(SearchRequest.model_fields["k"].default)
