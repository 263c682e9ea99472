"""The options that select the shots of a prompt from a support set, and those of abstention."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

import typer

from flamboyance_client.cli.completion import set_names
from flamboyance_client.fewshot import Selection
from flamboyance_client.options import ShotsAttend

Strategy = Literal["first", "random", "balanced", "rices_image", "rices_text", "mixed"]
# the methods and the controls of an evaluation
EvaluatedMethod = Literal["in_context", "nearest_mean", "knn", "linear", "blend"]
Control = Literal["text_only", "shuffled_labels", "encoder_features"]

SupportSetOption = Annotated[
    str | None,
    typer.Option(
        "--support-set",
        "-s",
        show_default=False,
        help="The set to take shots from: a name or id.",
        autocompletion=set_names,
    ),
]
K = Annotated[
    int | None,
    typer.Option("-k", "--k", min=0, show_default=False, help="The number of shots; without it the server's default."),
]
StrategyOption = Annotated[
    Strategy | None, typer.Option(show_default=False, help="How the shots are selected; without it rices_image.")
]
ShotsAttendOption = Annotated[
    ShotsAttend | None,
    typer.Option(
        show_default=False,
        help="What a shot reads besides itself: all shots before it (previous, the default), or no other.",
    ),
]
TargetAccuracy = Annotated[
    float | None,
    typer.Option(show_default=False, help="Leave images without a label where labels would be less accurate."),
]
TargetCoverage = Annotated[
    float | None, typer.Option(show_default=False, help="Label this share of images, the surest ones.")
]


def choices(literal: Any, help: str) -> Any:
    """Return an option that may be given several times, each time with a value of the literal."""
    values = get_args(literal)

    def check(chosen: list[str] | None) -> list[str] | None:
        for value in chosen or ():
            if value not in values:
                raise typer.BadParameter(f"{value!r} is not one of {', '.join(map(repr, values))}")
        return chosen

    return typer.Option(metavar=f"[{'|'.join(values)}]", show_default=False, callback=check, help=help)


def selection(support_set: str, k: int | None, strategy: Strategy | None) -> Selection:
    fields: Selection = {"support_set": support_set}
    if strategy is not None:
        fields["strategy"] = strategy
    if k is not None:
        fields["k"] = k
    return fields
