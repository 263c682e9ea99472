"""Trials: a grammar that would harm the worker ends a process of its own, and the next grammar has a new one."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from server.grammar import GrammarError, TrialUnavailable
from server.grammar.compiler import Grammars
from server.grammar.trials import Trials
from server.wire import Grammar
from tests.tiny_models import prompt_tokenizer

CAT = Grammar(kind="regex", text="cats?")


@pytest.fixture
def trials() -> Iterator[Trials]:
    trials = Trials(prompt_tokenizer())
    yield trials
    trials.stop()


def schema(value: Any) -> Grammar:
    return Grammar(kind="json", text=json.dumps(value))


def pid(trials: Trials) -> int:
    return trials.start().pid


def chain(length: int) -> Any:
    links = {f"{i}": {"$ref": f"#/$defs/{i + 1}"} for i in range(length)}
    return {"$defs": {**links, f"{length}": {"type": "null"}}, "$ref": "#/$defs/0"}


MEETING = {"allOf": [{"type": "string", "pattern": f"(.*[ab]{{{10 + i}}}c.*)"} for i in range(14)]}
NAMES = {"type": "object", "patternProperties": {f"^{i}_(a|b)*a$": {"type": "integer"} for i in range(800)}}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (MEETING, "this JSON schema takes more than 64 MiB of memory to compile"),
        (NAMES, "this JSON schema takes more than 1 seconds of processor time to compile"),
        (chain(3500), "this JSON schema is nested too deeply to be compiled"),
    ],
)
def test_a_harmful_grammar_ends_only_its_trial(
    trials: Trials, monkeypatch: pytest.MonkeyPatch, value: Any, message: str
) -> None:
    monkeypatch.setattr("server.grammar.trials.MODULE", "tests.server.grammar.unlimited_trial")
    first = pid(trials)
    with pytest.raises(GrammarError) as caught:
        trials.check(schema(value))
    assert str(caught.value) == message
    trials.check(schema({"type": "integer"}))
    assert pid(trials) != first


def test_a_process_tries_many_grammars(trials: Trials) -> None:
    first = pid(trials)
    trials.check(CAT)
    with pytest.raises(GrammarError, match="invalid regular expression"):
        trials.check(Grammar(kind="regex", text="(a"))
    with pytest.raises(GrammarError, match="not a JSON schema"):
        trials.check(Grammar(kind="json", text="{"))
    trials.check(CAT)
    assert pid(trials) == first


def test_a_process_that_was_killed_is_replaced(trials: Trials) -> None:
    os.kill(pid(trials), signal.SIGKILL)
    trials.check(CAT)


def test_a_process_that_does_not_answer_is_killed(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    os.kill(stopped := pid(trials), signal.SIGSTOP)
    monkeypatch.setattr("server.grammar.trials.ATTEMPTS", 1)
    monkeypatch.setattr("server.grammar.trials.WAIT_SECONDS", 0.2)
    with pytest.raises(TrialUnavailable, match="this regular expression cannot be checked now"):
        trials.check(CAT)
    monkeypatch.setattr("server.grammar.trials.WAIT_SECONDS", 60)
    trials.check(CAT)
    assert pid(trials) != stopped


def test_a_grammar_that_could_not_be_tried_is_tried_again(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(prompt_tokenizer(), trials)
    monkeypatch.setattr("server.grammar.trials.MODULE", "no_such_module")
    with pytest.raises(TrialUnavailable):
        grammars.compile(CAT).result(60)
    monkeypatch.undo()
    assert grammars.compile(CAT).result(60).copy().allowed(300).any()


def test_grammars_are_tried_before_they_are_compiled(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(prompt_tokenizer(), trials)
    grammars.build_table()
    grammars.start_trials()
    assert grammars.compile(CAT).result(60).copy().allowed(300).any()

    def refuse(grammar: Grammar) -> None:
        raise GrammarError("refused")

    monkeypatch.setattr(trials, "check", refuse)
    with pytest.raises(GrammarError, match="refused"):
        grammars.compile(Grammar(kind="regex", text="dogs?")).result(60)
