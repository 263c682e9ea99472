"""Says which route of this server to use in place of an unknown one, such as a route of another inference server."""

from __future__ import annotations

from collections.abc import Collection

from fastapi.routing import APIRoute

from server.errors import MethodNotAllowed, NotFound
from server.spelling import advice

CONVERSATIONS = "this server answers conversations at /v1/chat/completions"
NO_IMAGES = "this server generates no images"
NO_AUDIO = "this server has no audio"
# routes of OpenAI, Anthropic, Ollama and text-generation-inference
ELSEWHERE = {
    "/api/chat": CONVERSATIONS,
    "/api/embed": "embeddings are at /v1/embeddings",
    "/api/embeddings": "embeddings are at /v1/embeddings",
    "/api/generate": "this server continues prompts at /v1/completions",
    "/api/show": "the served model is described at /v1/models",
    "/api/tags": "the served model is listed at /v1/models",
    "/generate": "this server continues prompts at /v1/completions",
    "/generate_stream": "this server continues prompts at /v1/completions, with stream",
    "/v1/assistants": CONVERSATIONS,
    "/v1/audio/speech": NO_AUDIO,
    "/v1/audio/transcriptions": NO_AUDIO,
    "/v1/audio/translations": NO_AUDIO,
    "/v1/batches": "a request to /v1/completions may have a list of prompts",
    "/v1/files": "images and videos are uploaded to /v1/images",
    "/v1/fine_tuning/jobs": "examples are registered at /v1/support_sets, and need no fine-tuning",
    "/v1/images/edits": NO_IMAGES,
    "/v1/images/generations": NO_IMAGES,
    "/v1/images/variations": NO_IMAGES,
    "/v1/messages": CONVERSATIONS,
    "/v1/moderations": "this server classifies at /v1/classify, by your examples",
    "/v1/responses": CONVERSATIONS,
    "/v1/threads": CONVERSATIONS,
}


def no_route(method: str, path: str, routes: Collection[APIRoute]) -> NotFound | MethodNotAllowed:
    """Return the error of a request without a route, which names the methods of its path, or the path to use.

    A path of another server is not found, although it may look like an id: /v1/images/generations.
    """
    methods = {method for route in routes if route.path_regex.match(path) for method in route.methods or ()}
    if methods and path.rstrip("/") not in ELSEWHERE:
        return MethodNotAllowed(
            f"{method} {path}: use {' or '.join(sorted(methods))}", methods | ({"HEAD"} if "GET" in methods else set())
        )
    suggestion = _suggestion(path, {route.path for route in routes}) or "; /docs lists the routes"
    return NotFound(f"{method} {path}: no such route{suggestion}")


def _suggestion(path: str, paths: Collection[str]) -> str:
    """Return what to use in place of a path that is none of this server's `paths`, for the end of a message.

    That is the path with or without /v1, or a path that is spelled similarly; "" if there is none.
    """
    plain = path.rstrip("/")
    if plain in ELSEWHERE:
        return f"; {ELSEWHERE[plain]}"
    name = plain.rpartition("/v1/")[2].lstrip("/")
    ways = (way for way in (f"/v1/{name}", f"/{name}") if name and way in paths)
    meant = next(ways, None)
    return f"; did you mean {meant}?" if meant else advice(plain, paths)
