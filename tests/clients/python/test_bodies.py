"""Tests of values that cannot be sent as JSON: the error names the option, the field or the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flamboyance_client import Client, example
from flamboyance_client.bodies import encoded
from flamboyance_client.folders import labelled_files
from flamboyance_client.frames import Columns, labelled_rows
from flamboyance_client.labelled import with_ids
from flamboyance_client.stored import SupportSetCalls
from tests.clients.python.test_frames import Frame
from tests.clients.python.test_stored import Send

HALF = "\udcff"


@pytest.mark.parametrize(
    ("send", "field"),
    [
        (lambda c: c.complete("a", temperature=float("nan")), "temperature: nan is not a finite number"),
        (lambda c: c.complete("a", top_p=np.float64("inf")), "top_p: inf is not a finite number"),
        (lambda c: c.complete("a", logit_bias={"5": float("-inf")}), "logit_bias.5: -inf is not a finite number"),
        (lambda c: c.complete("a", stop=["b", HALF]), r"stop\[1\]: the text has '\\udcff' at 0, a surrogate"),
        (lambda c: c.classify_many(["img_1"], examples="pets", target_accuracy=float("nan")), "^target_accuracy: nan"),
        (lambda c: c.complete(f"hi{HALF}"), r"^prompt: the text has '\\udcff' at 2, a surrogate, which UTF-8 cannot"),
        (lambda c: c.complete(["é", HALF]), r"^prompt\[1\].text: the text has"),
        (lambda c: c.support_sets.put("pets", [example("img_1", metadata={"a": float("nan")})]), r"examples\[0\]"),
        (lambda c: c.support_sets.create(name=HALF), "^name: the text has"),
        (lambda c: c.support_sets.get(HALF), r"'\\udcff' is not a name or id"),
    ],
)
def test_a_value_that_cannot_be_sent_is_named(send: Send, field: str) -> None:
    with Client("http://nowhere") as client, pytest.raises(ValueError, match=field):
        send(client)


def test_numbers_and_lists_of_other_types_are_sent_as_those_of_json() -> None:
    body = {"k": np.int64(4), "labels": np.array(["a", "b"]), "range": range(2), "set": {"a"}, "keys": {"b": 1}.keys()}
    assert json.loads(encoded(body)) == {"k": 4, "labels": ["a", "b"], "range": [0, 1], "set": ["a"], "keys": ["b"]}
    options: Any = {"k": np.int64(4)}
    evaluation = SupportSetCalls().evaluate("pets", options)
    assert evaluation.body == {"k": [4]}


@pytest.mark.parametrize("value", [np.zeros((2, 2), np.uint8), object(), b"a", (i for i in range(2))])
def test_another_object_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match=f"a request cannot have a value of the type {type(value).__name__}$"):
        encoded({"metadata": value})


def test_a_label_that_is_no_text_is_named_with_its_file(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    (folder / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"1\.png: label: the text has '\\udce9' at 3, a surrogate"):
        with_ids(labelled_files(tmp_path))


@pytest.mark.parametrize("fields", [{"label": [HALF]}, {"label": ["a"], "url": [f"https://a.org/{HALF}.png"]}])
def test_a_row_that_is_no_text_is_named(fields: dict[str, Any]) -> None:
    columns = Columns(image="url", label="label", answer=None, question=None)
    with pytest.raises(ValueError, match=r"^row 0: ") as caught:
        with_ids(labelled_rows(Frame(**{"url": ["img_1"], **fields}), columns, ""))
    assert type(caught.value) is ValueError
