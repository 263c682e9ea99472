"""The section on few-shot completions lists what there is, and its worked example is a request that can be made."""

from __future__ import annotations

import json
import re
from typing import get_args

import msgspec

from model.prompt import EndOfChunk, Media, Text
from server.api.routes.fewshot import FewShotCompletionRequest
from server.fewshot.selection import DEFAULT_ORDER
from server.fewshot.templates import OPENFLAMINGO, PAPER, Query, Shot
from server.schemas.base import read
from server.schemas.fewshot import FewShotFields, Order, SearchRequest, Strategy
from tests.server.test_docs import API, names, rows, section

SECTION = section(API, "Few-shot completions")


def table(head: str) -> list[list[str]]:
    """Rows of the table whose first column is named so."""
    _, rest = re.split(rf"\n\| {re.escape(head)} \|.*\n\|---", SECTION)
    return rows(rest.partition("\n\n")[0])


def test_every_field_strategy_order_and_template_stands() -> None:
    assert [names(row[0])[0] for row in table("field")] != []
    assert {names(row[0])[0] for row in table("field")} == FewShotFields.model_fields.keys()
    assert [names(row[0])[0] for row in table("`strategy`")] == list(get_args(Strategy))
    assert {names(row[0])[0] for row in table("`order`")} == set(get_args(Order))


def test_the_order_of_each_strategy_is_the_one_that_is_told() -> None:
    told = {names(row[0])[0]: row[1] for row in table("`order`")}
    assert names(told["as_selected"]) == [name for name, order in DEFAULT_ORDER.items() if order == "as_selected"]
    assert names(told["stored"]) == [name for name, order in DEFAULT_ORDER.items() if order == "stored"]
    compares = [name for name, order in DEFAULT_ORDER.items() if order == "similar_last"]
    assert compares == ["rices_image", "rices_text", "mixed"]
    assert "the three that compare" in told["similar_last"]


def test_templates_are_written_as_is_told() -> None:
    told = {names(name)[0]: (first, second) for name, first, second in table("`template`")}
    assert told.keys() == {template.name for template in PAPER}
    for theirs, papers in zip(OPENFLAMINGO, PAPER, strict=True):
        first, second = told[theirs.name]
        assert names(first) == [theirs.shot]
        assert ("lines between shots" in first) == (theirs.separator == "\n")
        assert names(second) == [papers.shot]


def test_the_worked_example_can_be_asked_and_is_the_prompt_that_is_shown() -> None:
    request, prompt, answer = re.findall(r"```\n(.*?)\n```", SECTION, flags=re.DOTALL)
    fields = read(FewShotCompletionRequest, request.encode())
    assert fields.examples is not None
    shown = json.loads(answer.replace(" …,", ""))
    assert shown["fewshot"]["strategy"] == fields.examples.strategy
    scores = [shot["score"] for shot in shown["fewshot"]["shots"]]
    assert len(scores) == fields.examples.k
    assert scores == sorted(scores)
    (template,) = [template for template in PAPER if template.name == fields.template]
    texts = re.findall(r"Output: (.*?)<\|endofchunk\|>", prompt)
    segments = template.render([Shot(media=(b"",), text=text) for text in texts], Query(media=(b"",)))
    markers = {Media: "<image>", EndOfChunk: "<|endofchunk|>"}
    written = [one.text if isinstance(one, Text) else markers[type(one)] for one in segments]
    assert "".join(written) == prompt


def test_the_fields_of_a_search_stand() -> None:
    told = SECTION.partition("/search` answers")[2]
    assert SearchRequest.model_fields.keys() <= set(names(told))
    assert read(SearchRequest, msgspec.json.encode({"query": {}})).k == 8
