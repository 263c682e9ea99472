"""Checks of our own, which schemathesis loads as a module of hooks and makes of every response."""

from __future__ import annotations

from typing import Any

import schemathesis
from schemathesis import Case, CheckContext, Response

ENGINE_DIED = b'"code":"engine_died"'


@schemathesis.check
def the_worker_survives(_context: CheckContext, response: Response, _case: Case[Any]) -> None:
    """Fail for a request that was in the worker when the worker died."""
    assert ENGINE_DIED not in response.content, "the worker died"
