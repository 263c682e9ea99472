"""Tests of evaluations on the command line: interrupted, without a server, and shown by their ids."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from flamboyance_client import Client, NotConnected, TransportError
from flamboyance_client.evaluations import Evaluation
from flamboyance_client.resources import Evaluations
from tests.clients.python.cli.commands import documents, run, words

COMMAND = ("support-set", "evaluate", "cli-colours", "--method", "knn")


def latest(client: Client) -> Evaluation:
    page = client.evaluations.list(support_set="cli-colours", limit=100)
    assert not page.has_more
    return page.data[-1]


def started(evaluation: Evaluation) -> str:
    """Return the note about a new evaluation, which is written where there is no terminal."""
    return f"note: the evaluation {evaluation.id} has {evaluation.num_queries} queries"


def raising(error: BaseException) -> Callable[[Evaluations, str], Evaluation]:
    def wait(evaluations: Evaluations, evaluation_id: str) -> Evaluation:
        raise error

    return wait


def test_an_interrupt_cancels_the_evaluation(made: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Evaluations, "wait", raising(KeyboardInterrupt()))
    output, errors = run(*COMMAND, status=130)
    evaluation = latest(made)
    assert evaluation.is_over
    command = f"flamboyance-client support-set evaluation {evaluation.id}"
    expected = f"note: the evaluation is {evaluation.status}; to show its results: {command}"
    assert (output, errors.splitlines()) == ("", [started(evaluation), expected])


@pytest.mark.parametrize("error", [NotConnected("no"), KeyboardInterrupt()])
def test_an_evaluation_that_is_not_cancelled_is_named(
    made: Client, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(Evaluations, "wait", raising(KeyboardInterrupt()))
    monkeypatch.setattr(Evaluations, "cancel", raising(error))
    _, errors = run(*COMMAND, status=130)
    command = f"flamboyance-client support-set evaluation {latest(made).id} --cancel"
    expected = f"the evaluation was not cancelled, and continues on the server; to cancel it: {command}"
    assert errors.splitlines()[1:] == [f"note: {expected}"]


def test_an_evaluation_continues_without_its_command(made: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Evaluations, "wait", raising(TransportError("the connection was lost")))
    _, errors = run(*COMMAND, status=1)
    evaluation = latest(made)
    command = f"flamboyance-client support-set evaluation {evaluation.id}"
    assert errors.splitlines() == [
        started(evaluation),
        f"note: the evaluation continues when the server runs again; to show it: {command}",
        "error: the connection was lost",
    ]
    made.evaluations.cancel(evaluation.id)


def test_an_evaluation_is_shown_by_its_id(made: Client) -> None:
    completed = made.support_sets.evaluate("cli-colours", wait=True, methods=["knn"])
    (document,) = documents("support-set", "evaluation", completed.id)
    assert document == completed.raw
    output, _ = run("support-set", "evaluation", completed.id)
    assert f"--recommended {completed.id}" in output
    assert "completed" not in output
    (document,) = documents("support-set", "evaluation", completed.id, "--cancel")
    assert document["status"] == "completed"
    _, errors = run("support-set", "evaluation", "eval_0", status=1)
    assert errors.startswith("error: 404: ")


@pytest.mark.parametrize(
    ("state", "line"),
    [
        (
            {"status": "running", "progress": {"queries": 4, "queries_done": 1, "seconds_left": 0.2}},
            "running: 1 of 4 queries are done, about 1 s left",
        ),
        ({"status": "running"}, "running: 1 of 4 queries are done"),
        ({"status": "cancelled"}, "cancelled: its results are incomplete"),
        ({"status": "failed", "error": {"message": "the set is gone"}}, "failed: the set is gone"),
    ],
)
def test_an_evaluation_without_all_results_says_so(
    monkeypatch: pytest.MonkeyPatch, state: dict[str, object], line: str
) -> None:
    progress = {"queries": 4, "queries_done": 1}
    document = {"id": "eval_1", "queries": 2, "examples": 2, "progress": progress, **state}
    monkeypatch.setattr(Evaluations, "get", lambda evaluations, evaluation_id: Evaluation.parse(document))
    output, _ = run("support-set", "evaluation", "eval_1")
    assert output.splitlines()[-1] == line
    assert json.loads(run("support-set", "evaluation", "eval_1", "--json")[0]) == document


def test_evaluations_are_listed(made: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    other = made.support_sets.create(examples=[])
    ids = [made.support_sets.evaluate("cli-colours", wait=True, methods=["knn"]).id for _ in range(2)]
    monkeypatch.setattr("flamboyance_client.cli.pages.PAGE", 1)
    assert [document["id"] for document in documents("support-set", "evaluations", "cli-colours")][-2:] == ids
    assert documents("support-set", "evaluations", other.id) == []
    output, _ = run("support-set", "evaluations")
    (line,) = [line for line in words(output) if line[0] == ids[0]]
    assert line[1:4] == ["cli-colours", "1", "completed"]
    assert line[-1] == "s"  # the time that it took
    made.support_sets.delete(other.id)


def test_an_evaluation_whose_start_is_interrupted_can_be_found(made: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> Evaluation:
        raise KeyboardInterrupt

    monkeypatch.setattr("flamboyance_client.resources.SupportSets.evaluate", interrupted)
    _, errors = run(*COMMAND, status=130)
    assert errors.endswith("to find it: flamboyance-client support-set evaluations cli-colours\n")
