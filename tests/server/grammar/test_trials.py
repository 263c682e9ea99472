"""Trials: a grammar that would harm the worker ends a process of its own, and the next grammar has a new one."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llguidance import LLTokenizer

from server.grammar import GrammarError, TrialUnavailable
from server.grammar.compiler import Grammars, Source, source
from server.grammar.trial import Setup, encode, verdict
from server.grammar.trials import MODULE, Trials
from server.wire import Grammar
from tests.tiny_models import prompt_tokenizer

CAT = Grammar(kind="regex", text="cats?")
TABLE = LLTokenizer(prompt_tokenizer().to_json())


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


def test_a_process_that_was_suspended_is_replaced(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.grammar.trials.WAIT_SECONDS", 1e9)
    os.kill(suspended := pid(trials), signal.SIGSTOP)
    trials.check(CAT)
    assert pid(trials) != suspended


def test_a_process_that_does_not_answer_is_killed(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = pid(trials)
    monkeypatch.setattr("server.grammar.trials.is_suspended", lambda _: False)
    os.kill(stopped, signal.SIGSTOP)
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

    def refuse(grammar: Grammar) -> Source:
        raise GrammarError("refused")

    monkeypatch.setattr(trials, "check", refuse)
    with pytest.raises(GrammarError, match="refused"):
        grammars.compile(Grammar(kind="regex", text="dogs?")).result(60)


def test_a_trial_measures_the_memory_of_a_grammar(trials: Trials) -> None:
    trials.check(CAT)
    assert trials.check(schema({"const": "a" * 60_000})).num_bytes > 10_000_000
    assert trials.check(CAT).num_bytes < 1_000_000


def test_what_a_trial_has_read_is_not_read_again(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the worker reads a schema")

    grammar = schema({"type": "object", "properties": {"name": {"type": "string"}}})
    untried = Grammars(prompt_tokenizer()).compile(grammar).result(60)
    monkeypatch.setattr("server.grammar.compiler.closed", fail)
    tried = Grammars(prompt_tokenizer(), trials).compile(grammar).result(60)
    assert (tried.copy().allowed(300) == untried.copy().allowed(300)).all()
    assert [tried.must_end(num, 1000) for num in range(100)] == [untried.must_end(num, 1000) for num in range(100)]


def used_memory(trials: Trials) -> int:
    """Return the bytes of the process's data segment."""
    return int(Path(f"/proc/{pid(trials)}/statm").read_text().split()[5]) * resource.getpagesize()


def test_a_grammar_may_take_its_memory_whatever_others_have_left(
    trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials.check(CAT)
    idle = used_memory(trials)
    for number in range(6):
        trials.check(schema({"const": f"{number}{'x' * 60_000}"}))
        trials.check(schema({"enum": [f"{number}_{i:06d}" for i in range(9000)]}))
    trials.check(CAT)
    limits = Path(f"/proc/{pid(trials)}/limits").read_text()
    (limit,) = re.findall(r"Max data size +(\d+)", limits)
    assert used_memory(trials) - idle < 3 * 2**24
    assert int(limit) - used_memory(trials) > 60 * 2**20


def test_a_grammar_for_which_python_has_not_enough_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("server.grammar.compiler.begin", fail)
    refused = verdict(CAT, TABLE)
    assert refused.refusal == "this regular expression takes more than 64 MiB of memory to compile"
    assert not refused.unexpected


class Sized:
    """Trials that note which grammars they try, each of which takes 60 MB of memory."""

    def __init__(self) -> None:
        self.tried: list[str] = []

    def start(self) -> None:
        pass

    def check(self, grammar: Grammar) -> Source:
        self.tried.append(grammar.text)
        return msgspec.structs.replace(source(grammar, TABLE), num_bytes=60_000_000)


def test_the_kept_grammars_have_a_limit_of_memory() -> None:
    sized = Sized()
    grammars = Grammars(prompt_tokenizer(), sized)
    for text in ("a", "b", "a", "c", "c", "a", "b"):  # b is forgotten when c is used again
        grammars.compile(Grammar(kind="regex", text=text)).result(60)
    assert sized.tried == ["a", "b", "c", "b"]


@pytest.mark.parametrize("sent", ["setup", "part of it", "nothing"])
def test_a_process_whose_server_stops_before_it_is_ready_ends_silently(sent: str) -> None:
    ours, theirs = Pipe()
    command = [sys.executable, "-m", MODULE, str(theirs.fileno())]
    with theirs, ours:
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE)
        if sent == "setup":
            ours.send_bytes(encode(Setup(tokenizer=prompt_tokenizer().to_json(), eos_ids=(0,))))
        elif sent == "part of it":
            os.write(ours.fileno(), b"\0")
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, b"")
