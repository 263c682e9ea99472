"""`ask`: answers a question about one or more images; the answer is printed while it is generated."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer

from flamboyance_client.cli.connection import DEFAULT_URL, ApiKey, Json, Url, connected, failure, print_json
from flamboyance_client.cli.selection import K, ShotsAttendOption, StrategyOption, SupportSetOption, selection
from flamboyance_client.fewshot import MediaPart, query
from flamboyance_client.prompt import image, is_url, to_url, video

TEMPLATE = "vqa"
QUOTES = "; the question is one argument, in quotes if it has several words"


def ask(
    words: Annotated[
        list[str], typer.Argument(metavar="IMAGE... QUESTION", help="Paths or URLs of images, and then the question.")
    ],
    support_set: SupportSetOption = None,
    k: K = None,
    strategy: StrategyOption = None,
    shots_attend: ShotsAttendOption = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The maximum length of the answer.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 gives the most likely answer.")] = 0.0,
    seed: Annotated[int | None, typer.Option(show_default=False, help="Makes a random answer repeatable.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Ask a question about images, after worked examples if a support set is given.

    The examples of the set must have questions.
    """
    *images, question = words
    if not images:
        raise typer.BadParameter("give at least one image, and then the question", param_hint="IMAGE... QUESTION")
    if os.path.isfile(question):
        raise typer.BadParameter(f"the question comes last, and {question!r} is a file", param_hint="IMAGE... QUESTION")
    if missing := [path for path in images if not is_url(path) and not os.path.exists(path)]:
        raise failure(f"there is no file {missing[0]!r}" + (QUOTES if len(images) > 1 else ""))
    if support_set is None:
        for name, value in (("-k", k), ("--strategy", strategy), ("--shots-attend", shots_attend)):
            if value is not None:
                raise typer.BadParameter("it needs --support-set, from which the shots are taken", param_hint=name)
    options: dict[str, Any] = {"template": TEMPLATE, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    if support_set is not None:
        options |= {"examples": selection(support_set, k, strategy or "rices_image"), "shots_attend": shots_attend}
    with connected(url, api_key) as client:
        prompt = query([_part(path) for path in images], question=question)
        if json:
            print_json(client.fewshot.complete(prompt, **options).raw)
            return
        with client.fewshot.stream(prompt, **options) as events:
            for text in without_last_space(event.text for event in events):
                print(text, end="", flush=True)
        print()


def without_last_space(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts, each with the white space before it; that at the end is left out."""
    held = ""
    for text in texts:
        written = (held + text).rstrip()
        held = (held + text)[len(written) :]
        if written:
            yield written


def _part(source: str) -> MediaPart:
    url = to_url(source)
    return video(url) if url.startswith("data:video/") else image(url)
