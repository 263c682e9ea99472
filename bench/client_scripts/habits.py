"""Tries the habits of a client's users, each once, and reports each as one line of JSON.

This module runs in the client's environment, which lacks the packages of this repository.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping


def report(habits: Mapping[str, Callable[[], str]]) -> None:
    """Try habits in turn. A habit returns a description of its result, and raises an exception if it does not work."""
    for name, habit in habits.items():
        try:
            line = {"habit": name, "ok": True, "detail": habit()}
        except Exception as error:
            traceback.print_exc()
            line = {"habit": name, "ok": False, "detail": f"{type(error).__name__}: {error}"}
        print(json.dumps(line), flush=True)


def expect(is_met: bool, message: object) -> None:
    if not is_met:
        raise AssertionError(str(message))
