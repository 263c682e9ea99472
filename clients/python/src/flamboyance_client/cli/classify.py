"""`classify`: classifies images by the examples of a support set or of a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from flamboyance_client.api import OF_ALL_EXAMPLES, checked_selection
from flamboyance_client.batches import CONCURRENCY, run_all
from flamboyance_client.cli.connection import (
    DEFAULT_URL,
    ApiKey,
    Json,
    Url,
    connected,
    failure,
    message_of,
    note,
    print_json,
)
from flamboyance_client.cli.selection import K, Strategy, SupportSetOption, TargetAccuracy, TargetCoverage, selection
from flamboyance_client.cli.sources import Source, Sources, media_sources, name_of, note_removed
from flamboyance_client.cli.tables import print_table
from flamboyance_client.client import Client
from flamboyance_client.evaluations import Recommendation
from flamboyance_client.folders import named_media_files
from flamboyance_client.options import ClassifyOptions, Examples, Method, ShotsAttend
from flamboyance_client.records import Classification
from flamboyance_client.stored import NAME_TAKEN
from flamboyance_client.uploads import UNREADABLE

NUM_OTHERS = 2
# for a folder whose name cannot be that of a set, or is that of another
OTHER_NAME = "create a set with `support-set create --name NAME`, and give it as --support-set"
OTHER_SET = "create the set with `support-set create --skip-unreadable`, and give it as --support-set"


def classify(
    images: Sources,
    support_set: SupportSetOption = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder",
            "-f",
            show_default=False,
            help="Examples instead of a set: the names of subfolders are the labels.",
        ),
    ] = None,
    k: K = None,
    strategy: Annotated[
        Strategy | None,
        typer.Option(
            show_default=False,
            help="How shots are selected; without it as the server chooses.",
        ),
    ] = None,
    shots_attend: Annotated[
        ShotsAttend | None,
        typer.Option(show_default=False, help="What a shot reads besides itself: all shots before it, or no other."),
    ] = None,
    method: Annotated[
        Method | None, typer.Option(show_default=False, help="How the examples are used; without it auto.")
    ] = None,
    recommended: Annotated[
        str | None,
        typer.Option(
            metavar="EVALUATION", show_default=False, help="The set, method and shots that an evaluation recommends."
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            show_default=False, help="How the prompt is written; without it classification, or as it was evaluated."
        ),
    ] = None,
    target_accuracy: TargetAccuracy = None,
    target_coverage: TargetCoverage = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Classify images by the examples of a support set.

    A folder of examples becomes a support set of the same name, which is updated if the folder has changed.

    An update adds new files, and removes the examples of files that were uploaded earlier and are gone.
    """
    if recommended is not None and any(value is not None for value in (support_set, folder, k, strategy, method)):
        replaced = "it replaces --support-set, --folder, -k, --strategy and --method"
        raise typer.BadParameter(replaced, param_hint="--recommended")
    if recommended is None and (support_set is None) == (folder is None):
        choices = "give one of --support-set, --folder and --recommended"
        raise typer.BadParameter(choices, param_hint="--support-set")
    with connected(url, api_key, {NAME_TAKEN: OTHER_NAME, UNREADABLE: OTHER_SET}) as client:
        sources = media_sources(images, named_media_files)  # after a damaged one, it continues with the others
        examples: Examples
        if recommended is not None:
            examples = _recommendation(client, recommended)
        else:
            set_id = support_set if folder is None else _uploaded(client, folder)
            assert set_id is not None
            examples = selection(set_id, k, strategy)
        options: ClassifyOptions = {"examples": examples, "shots_attend": shots_attend, "method": method}
        options |= {"template": template, "target_accuracy": target_accuracy, "target_coverage": target_coverage}
        checked_selection(ClassifyOptions, options)
        outcomes = _classify(client, sources, options, url, json=json)
    _note_unused({"-k": k, "--strategy": strategy, "--shots-attend": shots_attend}, outcomes)
    if num_failed := sum(isinstance(outcome, Exception) for outcome in outcomes):
        raise failure(f"{num_failed} of {len(outcomes)} images were not classified")


def _classify(
    client: Client, sources: Sequence[Source], options: ClassifyOptions, url: str, *, json: bool
) -> list[Classification | Exception]:
    """Classify images, and print and return the outcomes: each in JSON when it is known, or all in a table."""
    for_people = Table("image", "label", "confidence", "next")
    remaining = iter(sources)

    def show(outcome: Classification | Exception) -> None:
        source = next(remaining)
        if json:
            print_json(_document(source, outcome, url))
        else:
            for_people.add_row(str(source), *_cells(outcome, url))

    outcomes = run_all(partial(client.classify, **options), [*sources], CONCURRENCY, client.close, show)
    if not json:
        print_table(for_people)
    return outcomes


def _note_unused(options: Mapping[str, object], outcomes: Sequence[Classification | Exception]) -> None:
    """Note options that select shots if all images were classified by methods without shots."""
    names = " and ".join(name for name, value in options.items() if value is not None)
    methods = {outcome.method for outcome in outcomes if isinstance(outcome, Classification)}
    if names and methods and methods <= OF_ALL_EXAMPLES:
        used = " and ".join(sorted(map(str, methods)))
        note(f"{used} used all examples, so {names} had no effect; --method in_context uses shots")


def _uploaded(client: Client, folder: Path) -> str:
    """Return the id of the support set of a folder, which is uploaded or updated."""
    uploaded = client.support_sets.from_folder(folder, name=name_of(folder, OTHER_NAME))
    note_removed(uploaded)
    return uploaded.id


def _recommendation(client: Client, evaluation_id: str) -> Recommendation:
    evaluation = client.evaluations.get(evaluation_id)
    if evaluation.recommendation is None:
        raise failure(f"the evaluation {evaluation_id} is {evaluation.status}, and recommends nothing")
    return evaluation.recommendation


def _document(source: Source, outcome: Classification | Exception, url: str) -> dict[str, Any]:
    if isinstance(outcome, Exception):
        return {"image": str(source), "error": message_of(outcome, url)}
    return {
        "image": str(source),
        "method": outcome.method,
        "label": outcome.label,
        "confidence": outcome.confidence,
        "threshold": outcome.threshold,
        "probabilities": dict(outcome.probabilities),
    }


def _cells(outcome: Classification | Exception, url: str) -> tuple[str, str, str]:
    if isinstance(outcome, Exception):
        return "", "", f"error: {message_of(outcome, url)}"
    candidates = [candidate for candidate in outcome.candidates if candidate.label != outcome.label][:NUM_OTHERS]
    return (
        outcome.label or "(no label)",
        f"{outcome.confidence:.2f}",
        ", ".join(f"{candidate.label} {candidate.probability:.2f}" for candidate in candidates),
    )
