"""Progress bars, and waiting for an evaluation: an error for one that fails."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Never

from tqdm.auto import tqdm

from flamboyance_client.errors import EvaluationFailed, FlamboyanceError, NotFound
from flamboyance_client.evaluations import Evaluation

POLL_SECONDS = 0.5
# the remaining time is the server's: tqdm takes all queries to be equal, and those of methods without prompts take no time
EVALUATION_FORM = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
# the delays after lost connections, until the last of which the evaluation is requested again
LOST_SECONDS = (1.0, 4.0, 15.0)


def visible_bar(
    total: int | None,
    description: str,
    unit: str,
    *,
    unit_scale: bool = False,
    is_hidden: bool = False,
    form: str | None = None,
) -> tqdm[Never]:
    """Return a progress bar that is visible in a notebook or on a terminal and nowhere else. `form` is tqdm's."""
    # a process without a console, such as pythonw, has no stderr, which tqdm would ask whether it is a terminal
    disable = True if is_hidden or sys.stderr is None else None
    return tqdm(total=total, desc=description, unit=unit, unit_scale=unit_scale, disable=disable, bar_format=form)


@contextmanager
def progress_bar(evaluation: Evaluation) -> Iterator[Callable[[Evaluation], None]]:
    """Yield a function that shows the progress of an evaluation, in a notebook or on a terminal and nowhere else."""
    with visible_bar(evaluation.num_queries, "evaluation", "query", form=EVALUATION_FORM) as bar:

        def show(current: Evaluation) -> None:
            bar.total = current.num_queries
            bar.set_postfix_str(_activity(current))
            bar.update(current.num_queries_done - bar.n)

        show(evaluation)
        yield show


def _activity(evaluation: Evaluation) -> str:
    """Return what the bar says about an evaluation: before the first answers, the server encodes the media of the set."""
    if evaluation.status == "queued":
        return "waits for its turn"
    is_preparing = evaluation.status == "running" and not evaluation.num_queries_done
    return "prepares the examples" if is_preparing else evaluation.time_left


@contextmanager
def continued(evaluation_id: str) -> Iterator[None]:
    """Add a note to an error of a wait: the evaluation continues on the server."""
    try:
        yield
    except NotFound:
        raise
    except FlamboyanceError as error:
        error.add_note(
            f"the evaluation {evaluation_id} continues; evaluations.wait({evaluation_id!r}) waits for it again"
        )
        raise


def completed(evaluation: Evaluation) -> Evaluation:
    """Return an evaluation that completed. Raises `EvaluationFailed` for any other."""
    if evaluation.status == "completed":
        return evaluation
    error = evaluation.raw.get("error") or {}
    raise EvaluationFailed(f"the evaluation {evaluation.id} {evaluation.status}: {error.get('message', 'no message')}")
