"""Additional checks of every response, which schemathesis loads as a module of hooks."""

from __future__ import annotations

from typing import Any

import schemathesis
from schemathesis import Case, CheckContext, Response

from server.limits.deadline import HEADER

ENGINE_DIED = b'"code":"engine_died"'
DEADLINE_EXCEEDED = 504


@schemathesis.check
def the_worker_survives(_context: CheckContext, response: Response, _case: Case[Any]) -> None:
    """Fail for a request that was in the worker when the worker died."""
    assert ENGINE_DIED not in response.content, "the worker died"


@schemathesis.check
def only_a_stated_deadline_passes(_context: CheckContext, response: Response, case: Case[Any]) -> None:
    """Fail for a 504 to a request that states no deadline: the server under test has none of its own."""
    fields = case.body if isinstance(case.body, dict) else {}
    is_stated = fields.get("timeout") is not None or HEADER in (case.headers or {})
    assert response.status_code != DEADLINE_EXCEEDED or is_stated, "a deadline passed that the request did not state"
