"""Advice for errors of the server: what a user of this client can do. Messages of other errors already say so."""

from __future__ import annotations

from collections.abc import Mapping

ADVICE: Mapping[str, str] = {
    "name_taken": "Choose another name, or delete that set",
    "version_conflict": "Another client has changed the set: get it again, and repeat the change",
    "image_in_use": "Delete the support sets that show it first",
    "invalid_api_key": "Client(api_key=...) takes a key of this server",
    "permission_denied": "Client(api_key=...) takes a key with the role and the tenant that the request needs",
    "origin_not_allowed": "A request with a key is accepted from any page: Client(api_key=...)",
    "too_many_support_sets": "Delete a support set first, or use a key whose limits permit more",
    "not_found": "Is this the address of a Flamboyance server of this version?",
    "model_not_found": "client.models() returns the served model",
    "support_set_not_found": "client.support_sets.list() returns the sets that exist",
    "example_not_found": "client.support_sets.examples(name) returns the examples that exist",
    "evaluation_not_found": "client.evaluations.list() returns the evaluations that exist",
    "image_not_found": "Upload it with client.images.upload(...), or send the image itself",
    "body_too_large": "Send fewer or smaller media, or raise the server's setting max_body_mb",
    "too_many_pixels": "Send fewer or smaller media at once, or raise the server's setting max_request_pixels",
    "too_many_examples": "Use several sets, or raise the server's setting max_set_examples",
    "context_length_exceeded": "Use fewer shots (k), or a smaller max_tokens",
    "client_over_share": "Send fewer requests at a time",
    "overloaded": "Send fewer requests at a time, or try again later",
    "engine_not_ready": "Wait until client.health().ready is true",
    "engine_died": "This request may be the cause: see the server's log before it is sent again",
    "engine_stalled": "This request may be the cause: see the server's log before it is sent again",
    "deadline_exceeded": "Pass a larger timeout=..., or raise the server's setting request_timeout",
}
# by path and code, for routes with limits of their own
OF_ROUTES: Mapping[tuple[str | None, str], str] = {
    (
        "/v1/support_sets",
        "name_taken",
    ): "Choose another name, or delete that set; create(..., exist_ok=True) returns it",
    (
        "/v1/support_sets/import",
        "body_too_large",
    ): "Import a smaller archive, or raise the server's setting max_import_mb",
}
# by status, for codes without advice
GENERAL: Mapping[int, str] = {
    401: ADVICE["invalid_api_key"],
    408: "Try again later",
    429: "Try again later",
    500: "The server's log has the cause",
    503: "Try again later",
}


def advice(code: str | int | None, status: int | None, path: str | None) -> str | None:
    """Return a sentence about what to do about an error of a path with this code and status, or None."""
    text = OF_ROUTES.get((path, str(code))) or ADVICE.get(str(code)) or GENERAL.get(status or 0)
    if text is None:
        return None
    return text if text.endswith("?") else f"{text}."
