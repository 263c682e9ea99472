"""Waiting for an evaluation: a progress bar, and an error for an evaluation that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from flamboyance_client.errors import EvaluationFailed
from flamboyance_client.evaluations import Evaluation

POLL_SECONDS = 0.5


@contextmanager
def progress_bar(evaluation: Evaluation) -> Iterator[Callable[[Evaluation], None]]:
    """Yield a function that shows the progress of an evaluation, in a notebook or on a terminal and nowhere else."""
    with tqdm(total=evaluation.num_queries, desc="evaluation", unit="query", disable=None) as bar:

        def show(current: Evaluation) -> None:
            bar.total = current.num_queries
            bar.update(current.num_queries_done - bar.n)

        show(evaluation)
        yield show


def completed(evaluation: Evaluation) -> Evaluation:
    """Return an evaluation that completed. Raises `EvaluationFailed` for any other."""
    if evaluation.status == "completed":
        return evaluation
    error = evaluation.raw.get("error") or {}
    raise EvaluationFailed(f"the evaluation {evaluation.id} {evaluation.status}: {error.get('message', 'no message')}")
