"""Tests that errors keep their type, text and fields when they are pickled or copied, as a pool of processes does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest

from flamboyance_client import ApiError, BadRequest, Classification, FlamboyanceError, QueriesFailed
from flamboyance_client.errors import Refusal

REFUSAL = Refusal(
    message="no such set",
    type="invalid_request_error",
    param="examples",
    code="support_set_not_found",
    status=404,
    request_id="r-1",
    retry_after=2.5,
    should_retry=False,
)


def subclasses(kind: type[FlamboyanceError]) -> Iterator[type[FlamboyanceError]]:
    yield kind
    for subclass in kind.__subclasses__():
        yield from subclasses(subclass)


def made(kind: type[FlamboyanceError]) -> FlamboyanceError:
    if issubclass(kind, ApiError):
        return kind(REFUSAL)
    if issubclass(kind, QueriesFailed):
        classified = Classification.parse({"label": "wren", "confidence": 0.5, "candidates": []})
        return kind(
            "2 of 3 queries failed", [classified, BadRequest(REFUSAL), FileNotFoundError(2, "no file", "a.png")]
        )
    return kind("no reply")


def pickled(protocol: int) -> Callable[[FlamboyanceError], FlamboyanceError]:
    return lambda error: pickle.loads(pickle.dumps(error, protocol))


def fields(error: BaseException) -> dict[str, object]:
    return {name: repr(value) for name, value in vars(error).items()}


COPIERS: list[Callable[[FlamboyanceError], FlamboyanceError]] = [
    *map(pickled, range(pickle.HIGHEST_PROTOCOL + 1)),
    copy.copy,
    copy.deepcopy,
]


@pytest.mark.parametrize("kind", [*subclasses(FlamboyanceError)], ids=lambda kind: kind.__name__)
def test_an_error_is_the_same_after_a_round_trip(kind: type[FlamboyanceError]) -> None:
    error = made(kind)
    error.add_note("seen in a process of a pool")
    for copied in COPIERS:
        twin = copied(error)
        assert type(twin) is kind
        assert (str(twin), twin.args, fields(twin)) == (str(error), error.args, fields(error))


def test_the_subject_of_an_error_is_kept() -> None:
    error = BadRequest(REFUSAL).about("a.png")
    twin = pickle.loads(pickle.dumps(error))
    assert str(twin) == str(error)
    assert twin.message == "a.png: no such set"
