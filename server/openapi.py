"""`flamboyance openapi` prints the OpenAPI document without a server, for programs that generate clients or types."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from fastapi import FastAPI

from server.api.openapi import openapi_document, operation_id
from server.app import ROUTERS, TITLE
from server.version import VERSION


@cache
def document() -> dict[str, Any]:
    app = FastAPI(generate_unique_id_function=operation_id)
    for router in ROUTERS:
        app.include_router(router)
    return openapi_document(app.routes, TITLE, VERSION)


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    argparse.ArgumentParser(prog, description="Print the OpenAPI document of the HTTP API.").parse_args(arguments)
    print(json.dumps(document(), indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
