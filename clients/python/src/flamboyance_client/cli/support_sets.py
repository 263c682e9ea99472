"""`support-set`: the support sets of a server, by name or by id."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from flamboyance_client.accuracy import Accuracy, requests_by_method
from flamboyance_client.cli import tables
from flamboyance_client.cli.completion import set_names
from flamboyance_client.cli.connection import DEFAULT_URL, ApiKey, Json, Url, connected, failure, note, print_json
from flamboyance_client.cli.evaluations import evaluation as evaluation_by_id
from flamboyance_client.cli.evaluations import finished, list_evaluations, print_evaluation, started
from flamboyance_client.cli.held_out import as_document, held_out, print_accuracies
from flamboyance_client.cli.pages import all_items
from flamboyance_client.cli.selection import Control, EvaluatedMethod, Strategy, TargetAccuracy, TargetCoverage, choices
from flamboyance_client.cli.sources import Sources, media_sources, name_of, note_removed
from flamboyance_client.client import Client
from flamboyance_client.errors import NotFound, QueriesFailed
from flamboyance_client.folders import empty_subfolders, label_of, listed, other_files
from flamboyance_client.options import ClassifyOptions, EvaluateOptions, Method, ShotsAttend
from flamboyance_client.records import SkippedFile, SupportSet
from flamboyance_client.stored import NAME_TAKEN
from flamboyance_client.transfers import archive_path
from flamboyance_client.uploads import UNREADABLE

# the code of the error for a file that is no archive of a set
INVALID_ARCHIVE = "invalid_archive"
# of those that a note names
MAX_OTHER_FILES = 3

app = typer.Typer(help="Create, show, evaluate, test, diagnose, move and delete support sets.", no_args_is_help=True)

Name = Annotated[
    str,
    typer.Argument(metavar="NAME", show_default=False, help="The name or the id of a set.", autocompletion=set_names),
]
PINNED = "Keep the set's images in the caches, so that requests do not wait."
OTHER_NAME = "give another name with --name, or delete that set"
EXPORTED = "must be a file that `support-set export` has written"
WITHOUT_UNREADABLE = "--skip-unreadable leaves such files out"
Version = Annotated[int | None, typer.Option(min=1, show_default=False, help="A version; without it the latest.")]


@app.command()
def create(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A folder whose subfolders are named after the labels.")
    ],
    name: Annotated[
        str | None,
        typer.Option(
            show_default=False, help="The name; without it the folder's, with - for characters that names cannot have."
        ),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(show_default=False, help="The question that the labels answer, which `ask` needs, once for all."),
    ] = None,
    update: Annotated[bool, typer.Option(help="Update a set that has the name already.")] = True,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out files that the server cannot read, and name them.")
    ] = False,
    pinned: Annotated[bool, typer.Option("--pinned", help=PINNED)] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Create a set of the images and videos in a folder, or update it.

    An update adds new files, and removes the examples of files that were uploaded earlier and are gone.

    Other examples stay.
    """
    options: dict[str, Any] = {"pinned": True} if pinned else {}
    options |= {"question": question, "exist_ok": update, "skip_unreadable": skip_unreadable}
    with connected(url, api_key, {NAME_TAKEN: OTHER_NAME, UNREADABLE: WITHOUT_UNREADABLE}) as client:
        name = name_of(folder, "give --name") if name is None else name
        earlier = _find(client, name)
        created = client.support_sets.from_folder(folder, name=name, **options)
        _print(created, as_json=json)
        note_removed(created)
        for file in created.skipped:
            note(f"left out: {file}")
        for text in _notes(folder, list(created.raw.get("label_counts") or {}), created.skipped):
            note(text)
        if earlier is not None and earlier.version == created.version and not json:
            print("The examples are unchanged.")


@app.command("list")
def list_sets(url: Url = DEFAULT_URL, api_key: ApiKey = None, json: Json = False) -> None:
    """List the sets in the order of their creation."""
    with connected(url, api_key) as client:
        sets = list(all_items(client.support_sets.list))
    if not json:
        tables.print_sets(sets)
    for support_set in sets if json else ():
        print_json(support_set.raw)


@app.command()
def show(
    name: Name, version: Version = None, url: Url = DEFAULT_URL, api_key: ApiKey = None, json: Json = False
) -> None:
    """Show a set and its labels."""
    with connected(url, api_key) as client:
        _print(client.support_sets.get(name, version=version), as_json=json)


@app.command()
def evaluate(
    context: typer.Context,
    name: Name,
    k: Annotated[
        list[int] | None, typer.Option("-k", "--k", min=0, show_default=False, help="A number of shots.")
    ] = None,
    strategy: Annotated[list[str] | None, choices(Strategy, "How shots are selected.")] = None,
    method: Annotated[
        list[str] | None, choices(EvaluatedMethod, "How the examples are used; without it all methods.")
    ] = None,
    control: Annotated[
        list[str] | None,
        choices(Control, "Add a control experiment: without images, for example, or with wrong labels."),
    ] = None,
    shots_attend: Annotated[
        list[str] | None, choices(ShotsAttend, "The form of the prompts; without it previous.")
    ] = None,
    max_queries: Annotated[
        int | None, typer.Option(min=1, show_default=False, help="At most this number of examples are used as queries.")
    ] = None,
    version: Version = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Measure how well a set answers, by leaving out each of its examples in turn. Ctrl-C cancels it.

    -k, --strategy, --method, --control and --shots-attend may be given several times.
    """
    options: EvaluateOptions = {"k": k, "strategies": strategy, "methods": method, "controls": control}
    options |= {"shots_attend": shots_attend, "max_queries": max_queries, "version": version}
    with connected(url, api_key) as client:
        evaluation = finished(client, started(client, name, options, context, is_quiet=json), context)
    print_evaluation(evaluation, context, as_json=json)


app.command("evaluation")(evaluation_by_id)
app.command("evaluations")(list_evaluations)


@app.command("test")
def measure(
    name: Name,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Other images, in subfolders that are named after their labels.")
    ],
    method: Annotated[
        list[str] | None, choices(Method, "How the examples are used; without it auto and nearest_mean.")
    ] = None,
    target_accuracy: TargetAccuracy = None,
    target_coverage: TargetCoverage = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Measure how well a set labels the images and videos of a folder, by one or more methods.

    Images that are examples of the set are left out.

    --method may be given several times; the first is compared with the others.
    """
    methods = cast("list[Method]", method or ["auto", "nearest_mean"])
    with connected(url, api_key) as client:
        queries, num_known = held_out(client, name, folder)
        options: ClassifyOptions = {"examples": name}
        options |= {"target_accuracy": target_accuracy, "target_coverage": target_coverage}
        for _, request in requests_by_method(methods, options):
            # a method that the server refuses ends the command before others have taken minutes
            client.classify(queries[0][0], **request)
        try:
            accuracies = client.measure(queries, methods=methods, **options)
        except QueriesFailed as error:
            _print_accuracies(error.accuracies, num_known, as_json=json)
            raise
    _print_accuracies(accuracies, num_known, as_json=json)


def _print_accuracies(accuracies: Sequence[Accuracy], num_known: int, *, as_json: bool) -> None:
    if as_json:
        for accuracy in accuracies:
            print_json(as_document(accuracy, num_known))
    elif accuracies:
        print_accuracies(accuracies, num_known)


@app.command()
def diagnose(
    name: Name,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="The most entries of each kind.")] = 20,
    version: Version = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Name the examples of a set that look mislabelled, harm the others, repeat, or contradict each other."""
    with connected(url, api_key) as client:
        diagnostics = client.support_sets.diagnostics(name, version=version, limit=limit)
    if json:
        print_json(diagnostics.raw)
    else:
        tables.print_diagnostics(diagnostics)


@app.command()
def suggest(
    name: Name,
    images: Sources,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many images to suggest.")] = 8,
    version: Version = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Suggest which images without a label to label next, and to add to a set."""
    with connected(url, api_key) as client:
        sources = media_sources(images)
        suggestions = client.support_sets.suggest(name, sources, count=count, version=version)
    if json:
        for suggestion in suggestions:
            print_json({"image": str(sources[suggestion.index]), **suggestion.raw})
        for index, example_id in suggestions.known.items():
            print_json({"image": str(sources[index]), "index": index, "example": example_id})
    else:
        tables.print_suggestions(suggestions, sources)


@app.command()
def warm(name: Name, url: Url = DEFAULT_URL, api_key: ApiKey = None, json: Json = False) -> None:
    """Encode the media of a set now, so that its first requests need not wait. It continues on the server."""
    with connected(url, api_key) as client:
        _print(client.support_sets.warm(name), as_json=json)


@app.command()
def export(
    name: Name,
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", show_default=False, help="The file to write, or a folder; without it NAME.zip."),
    ] = Path(),
    version: Version = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that exists.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Save a set with its media as one file."""
    _check_file(file, "standard output is written as /dev/stdout --force")
    target = archive_path(file, name)
    if target.exists() and not force:
        raise failure(f"{target} exists: give another file, or --force to overwrite it")
    with connected(url, api_key) as client:
        try:
            path = client.support_sets.export(name, file, version=version)
        except PermissionError as error:
            raise failure(f"{target} cannot be written ({error.strerror}): give another FILE") from None
        size = path.stat().st_size
    if not path.is_file():
        return  # a pipe, which may be stdout, or a device
    if json:
        print_json({"file": str(path), "bytes": size})
    else:
        print(f"{path} ({size:,} bytes)")


@app.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `export` has written.")],
    name: Annotated[
        str | None, typer.Option(show_default=False, help="The name; without it the one in the file.")
    ] = None,
    exist_ok: Annotated[
        bool, typer.Option("--exist-ok", help="Leave a set that has the name already as it is.")
    ] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Create a set from a file."""
    _check_file(file, "standard input is read as /dev/stdin")
    hints = {NAME_TAKEN: f"{OTHER_NAME}, or keep it with --exist-ok", INVALID_ARCHIVE: f"{file} {EXPORTED}"}
    with connected(url, api_key, hints) as client:
        _print(client.support_sets.import_(file, name=name, exist_ok=exist_ok), as_json=json)


@app.command()
def delete(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME", help="The names or the ids of sets.", autocompletion=set_names)
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without a question.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Delete sets, with their versions and the media that nothing else uses."""
    if not yes and sys.stdin.isatty():
        typer.confirm(f"Delete {', '.join(names)}?", abort=True, err=True)
    with connected(url, api_key) as client:
        for name in names:
            client.support_sets.delete(name)
            if json:
                print_json({"name": name, "deleted": True})
            else:
                print(f"{name} deleted")


def _check_file(file: Path, otherwise: str) -> None:
    """End the command for the `-` of other commands, which would be the name of a file."""
    if str(file) == "-":
        raise failure(f"- is no name of a file here; {otherwise}")


def _find(client: Client, name: str) -> SupportSet | None:
    try:
        return client.support_sets.get(name)
    except NotFound:
        return None


def _notes(folder: Path, labels: Sequence[str], skipped: Sequence[SkippedFile]) -> Iterator[str]:
    """Yield what may be a mistake in a folder, though a set could be made of it."""
    labels_of_skipped = dict.fromkeys(label_of(Path(file.path), folder) for file in skipped)
    if lost := [label for label in labels_of_skipped if label not in labels]:
        yield f"all of their files were left out, and so no labels: {listed(lost)}"
    if files := other_files(folder):
        yield f"no images or videos, and so left out: {listed(files, MAX_OTHER_FILES)}"
    if empty := empty_subfolders(folder):
        yield f"without an image or a video, and so no labels: {listed(empty)}"
    spellings: dict[str, list[str]] = {}
    for label in labels:
        spellings.setdefault(" ".join(label.split()).casefold(), []).append(repr(label))
    if similar := [" and ".join(group) for group in spellings.values() if len(group) > 1]:
        yield f"labels that differ only in case or white space: {listed(similar)}"
    if len(labels) == 1:
        yield "the set has one label, which is the answer to every classification"


def _print(support_set: SupportSet, *, as_json: bool) -> None:
    if as_json:
        skipped = {"skipped": list(map(asdict, support_set.skipped))} if support_set.skipped else {}
        print_json({**support_set.raw, **skipped})
    else:
        tables.print_set(support_set)
