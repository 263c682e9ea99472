"""The roles of API keys, and the role that each route needs.

`inference` may send requests to the model and read, `manage` may also change stored data, `admin` may also manage keys. A
route that is in no table needs `admin`, so a new route is closed until it gets a role here.
"""

from __future__ import annotations

from typing import Literal, get_args

Role = Literal["inference", "manage", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)

INFERENCE = frozenset(
    {
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/fewshot/completions"),
        ("POST", "/v1/classify"),
        ("POST", "/v1/score"),
        ("POST", "/v1/decisions"),
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/inspect"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/tokenizer_info"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/{name:path}"),
        ("GET", "/v1/images"),
        ("GET", "/v1/images/{image_id}"),
        ("GET", "/v1/images/{image_id}/content"),
        ("GET", "/v1/support_sets"),
        ("GET", "/v1/support_sets/{support_set}"),
        ("GET", "/v1/support_sets/{support_set}/versions"),
        ("GET", "/v1/support_sets/{support_set}/examples"),
        ("GET", "/v1/support_sets/{support_set}/examples/{example_id}"),
        ("GET", "/v1/support_sets/{support_set}/diagnostics"),
        ("GET", "/v1/support_sets/{support_set}/export"),
        ("POST", "/v1/support_sets/{support_set}/search"),
        ("POST", "/v1/support_sets/{support_set}/suggest"),
        ("GET", "/v1/evaluations"),
        ("GET", "/v1/evaluations/{evaluation_id}"),
        ("GET", "/health/live"),
        ("GET", "/health/ready"),
        ("GET", "/health/progress"),
        ("GET", "/health"),
        ("GET", "/version"),
        ("GET", "/metrics"),
        ("GET", "/docs"),
        ("GET", "/docs/"),
        ("GET", "/docs/{asset}"),
        ("GET", "/"),
        ("GET", "/playground"),
        ("GET", "/playground/{file:path}"),
    }
)
MANAGE = frozenset(
    {
        ("POST", "/v1/images"),
        ("DELETE", "/v1/images/{image_id}"),
        ("POST", "/v1/support_sets"),
        ("PATCH", "/v1/support_sets/{support_set}"),
        ("DELETE", "/v1/support_sets/{support_set}"),
        ("POST", "/v1/support_sets/{support_set}/examples"),
        ("DELETE", "/v1/support_sets/{support_set}/examples"),
        ("DELETE", "/v1/support_sets/{support_set}/examples/{example_id}"),
        ("POST", "/v1/support_sets/{support_set}/warm"),
        ("POST", "/v1/support_sets/{support_set}/evaluate"),
        ("POST", "/v1/support_sets/import"),
        ("POST", "/v1/evaluations/{evaluation_id}/cancel"),
        ("DELETE", "/v1/evaluations/{evaluation_id}"),
    }
)
# their responses are about all tenants: with keys, only those of the default tenant, the operator's, may read them
OPERATOR_PATHS = frozenset({"/metrics"})


def needed_role(method: str, path: str) -> Role:
    """Return the role that a route needs; `path` is its template, with the names of its parameters."""
    route = (method, path)
    return "inference" if route in INFERENCE else "manage" if route in MANAGE else "admin"


def may(role: Role, needed: Role) -> bool:
    return ROLES.index(role) >= ROLES.index(needed)
