"""Work of several calls, written once for both clients: a generator that yields calls and receives their replies.

A call that fails raises its error where it was yielded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from flamboyance_client.api import Call
from flamboyance_client.errors import FlamboyanceError

Result = TypeVar("Result")

Steps = Generator[Call[Any], Any, Result]


@dataclass(frozen=True, slots=True)
class Finished(Generic[Result]):
    """The result of a generator that has ended."""

    result: Result


def run(send: Callable[[Call[Any]], Any], steps: Steps[Result]) -> Result:
    """Send the calls of `steps` one after another, and return its result."""
    step = _advance(steps, None)
    while not isinstance(step, Finished):
        try:
            outcome = send(step)
        except FlamboyanceError as error:
            outcome = error
        step = _advance(steps, outcome)
    return step.result


async def run_async(send: Callable[[Call[Any]], Awaitable[Any]], steps: Steps[Result]) -> Result:
    """Do the same with asyncio. A thread runs the generator, since it reads files."""
    step = await asyncio.to_thread(_advance, steps, None)
    while not isinstance(step, Finished):
        try:
            outcome = await send(step)
        except FlamboyanceError as error:
            outcome = error
        step = await asyncio.to_thread(_advance, steps, outcome)
    return step.result


def _advance(steps: Steps[Result], outcome: Any) -> Call[Any] | Finished[Result]:
    """Pass a reply or an error to the generator, and return its next call."""
    try:
        return steps.throw(outcome) if isinstance(outcome, FlamboyanceError) else steps.send(outcome)
    except StopIteration as stop:
        return Finished(stop.value)
