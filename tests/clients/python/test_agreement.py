"""Client and server say the same: every field of the server's completion request is an option, and none is invented."""

from __future__ import annotations

from typing import get_args, get_type_hints

from flamboyance_client import Options, StructuredOutputs
from flamboyance_client.prompt import Part
from server.api import schemas

# the prompt is an argument of its own, and the client sets these two where a stream is asked for
NOT_OPTIONS = {"prompt", "stream", "stream_options"}


def test_the_options_are_the_servers_fields() -> None:
    assert Options.__annotations__.keys() == schemas.CompletionRequest.model_fields.keys() - NOT_OPTIONS


def test_the_forms_of_an_answer_are_the_servers() -> None:
    theirs = {field.alias or name for name, field in schemas.StructuredOutputs.model_fields.items()}
    assert StructuredOutputs.__annotations__.keys() == theirs


def test_the_parts_are_the_servers_parts() -> None:
    ours = {get_args(get_type_hints(kind)["type"]) for kind in get_args(Part)}
    tagged = get_args(get_args(schemas.Part)[0])
    theirs = {get_args(get_args(part)[0].model_fields["type"].annotation) for part in tagged}
    assert ours == theirs
