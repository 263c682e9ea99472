"""Tests of the calls about which examples matter, of both clients with a fake server: requests and parsed replies."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from flamboyance_client import Client, UnexpectedReply
from tests.clients.python.test_stored import PNG, exchange

PNG_URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
NOTHING: dict[str, Any] = {"count": 0, "data": []}
DIAGNOSTICS = {
    "support_set": "ss_1",
    "version": 2,
    "examples": 9,
    "left_out": {"accuracy": 0.875},
    "mislabelled": {
        "count": 3,
        "data": [{"id": "a", "label": "cat", "looks_like": "dog", "score": 0.5, "new_field": 1}],
    },
    "harmful": {"count": 1, "data": [{"id": "b", "label": "dog", "value": -0.25}]},
    "redundant": NOTHING,
    "conflicting": {
        "count": 1,
        "data": [{"ids": ["a", "b"], "labels": ["cat", "dog"], "similarity": 1.0, "same_media": True}],
    },
    "confused": {"count": 1, "data": [{"labels": ["cat", "dog"], "count": 3, "counts": [1, 2]}]},
}
SUGGESTIONS = {
    "data": [
        {
            "index": 1,
            "labels": [{"label": "cat", "probability": 0.5}, {"label": "dog", "probability": 0.25}],
            "reason": {"margin": 0.25, "similarity": None, "gain": 0.125},
        }
    ],
    "known": [{"index": 0, "example": "a"}],
}


def test_diagnostics_are_lists_of_findings() -> None:
    request, diagnostics = exchange(lambda c: c.support_sets.diagnostics("pets", version=2, limit=5), DIAGNOSTICS)
    assert (request.method, request.url.raw_path) == ("GET", b"/v1/support_sets/pets/diagnostics?version=2&limit=5")
    assert (diagnostics.version, diagnostics.examples, diagnostics.accuracy) == (2, 9, 0.875)
    assert diagnostics.mislabelled.count == 3
    assert [(entry.id, entry.looks_like, entry.score) for entry in diagnostics.mislabelled] == [("a", "dog", 0.5)]
    assert [(entry.id, entry.value) for entry in diagnostics.harmful] == [("b", -0.25)]
    assert len(diagnostics.redundant) == 0
    assert [(entry.ids, entry.labels, entry.same_media) for entry in diagnostics.conflicting] == [
        (("a", "b"), ("cat", "dog"), True)
    ]
    assert [entry.counts for entry in diagnostics.confused] == [(1, 2)]


@pytest.mark.parametrize("section", [None, {"count": 1}, {"count": 1, "data": [{"id": "a"}]}])
def test_diagnostics_of_another_form_are_unexpected(section: Any) -> None:
    with pytest.raises(UnexpectedReply, match="mislabelled"):
        exchange(lambda c: c.support_sets.diagnostics("pets"), {**DIAGNOSTICS, "mislabelled": section})


def test_suggestions_hold_the_media_of_the_pool() -> None:
    request, suggestions = exchange(lambda c: c.support_sets.suggest("pets", ["img_1", PNG], count=1), SUGGESTIONS)
    assert (request.method, request.url.raw_path) == ("POST", b"/v1/support_sets/pets/suggest")
    assert json.loads(request.content) == {"pool": [{"image": "img_1"}, {"image": PNG_URL}], "count": 1}
    (suggestion,) = suggestions
    assert (suggestion.index, suggestion.media) == (1, PNG)
    assert suggestion.probabilities == {"cat": 0.5, "dog": 0.25}
    assert suggestion.reason["gain"] == 0.125
    assert suggestions.known == {0: "a"}


def test_a_pool_is_a_list() -> None:
    with Client("http://server") as client, pytest.raises(TypeError, match="must be a list"):
        client.support_sets.suggest("pets", "pictures")
