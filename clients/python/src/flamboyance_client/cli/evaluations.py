"""The evaluations of support sets: all of them, one by its id, and how `support-set evaluate` starts and awaits one."""

from __future__ import annotations

from typing import Annotated

import typer

from flamboyance_client.cli import INTERRUPTED, tables
from flamboyance_client.cli.completion import set_names
from flamboyance_client.cli.connection import DEFAULT_URL, ApiKey, Json, Url, connected, note, print_json
from flamboyance_client.cli.pages import all_items
from flamboyance_client.client import Client
from flamboyance_client.errors import FlamboyanceError, TransportError, Unavailable
from flamboyance_client.evaluations import Evaluation
from flamboyance_client.options import EvaluateOptions

MANY_QUERIES = 8
QUICK = ", some of them with prompts; `--method nearest_mean --method linear` have none, and take seconds"


def evaluation(
    context: typer.Context,
    evaluation_id: Annotated[str, typer.Argument(metavar="EVALUATION", help="The id of an evaluation.")],
    cancel: Annotated[bool, typer.Option("--cancel", help="End it first, and keep its results so far.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Show an evaluation that another command has started, with its results so far."""
    with connected(url, api_key) as client:
        report = client.evaluations.cancel(evaluation_id) if cancel else client.evaluations.get(evaluation_id)
    print_evaluation(report, context, as_json=json)


def list_evaluations(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            show_default=False,
            help="The name or the id of a set; else all.",
            autocompletion=set_names,
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """List the evaluations, or those of a set, the oldest first."""
    with connected(url, api_key) as client:
        evaluations = list(all_items(client.evaluations.list, support_set=name))
        if json:
            for evaluation in evaluations:
                print_json(evaluation.raw)
        else:
            names = {each.id: each.name for each in all_items(client.support_sets.list) if each.name}
            tables.print_evaluations(evaluations, names)


def print_evaluation(evaluation: Evaluation, context: typer.Context, *, as_json: bool) -> None:
    if as_json:
        print_json(evaluation.raw)
    else:
        tables.print_evaluation(evaluation, str(context.find_root().info_name))


def started(client: Client, name: str, options: EvaluateOptions, context: typer.Context, *, is_quiet: bool) -> str:
    """Start an evaluation and return its id. A note has it and, for many queries of all methods, the quick ones.

    After an interrupt, a note says how to find the evaluation.
    """
    try:
        evaluation = client.support_sets.evaluate(name, **options)
    except KeyboardInterrupt:
        command = f"{context.find_root().info_name} support-set evaluations {name}"
        note(f"the evaluation may have started, and then continues on the server; to find it: {command}")
        raise typer.Exit(INTERRUPTED) from None
    if not is_quiet:
        quick = QUICK if not options.get("methods") and evaluation.num_queries >= MANY_QUERIES else ""
        note(f"the evaluation {evaluation.id} has {evaluation.num_queries} queries{quick}")
    return evaluation.id


def finished(client: Client, evaluation_id: str, context: typer.Context) -> Evaluation:
    """Wait for an evaluation. An interrupt cancels it. If the server stops, a note says how to read it later."""
    command = f"{context.find_root().info_name} support-set evaluation {evaluation_id}"
    try:
        return client.evaluations.wait(evaluation_id)
    except KeyboardInterrupt:
        _cancel(client, evaluation_id, command)
        raise typer.Exit(INTERRUPTED) from None
    except (TransportError, Unavailable):
        note(f"the evaluation continues when the server runs again; to show it: {command}")
        raise


def _cancel(client: Client, evaluation_id: str, command: str) -> None:
    try:
        status = client.evaluations.cancel(evaluation_id).status
    except (FlamboyanceError, KeyboardInterrupt):
        note(f"the evaluation was not cancelled, and continues on the server; to cancel it: {command} --cancel")
    else:
        note(f"the evaluation is {status}; to show its results: {command}")
