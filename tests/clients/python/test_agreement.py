"""Tests that the options of the client are exactly the fields of the server's requests."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest

import flamboyance_client as client
from flamboyance_client.cli import selection
from flamboyance_client.prompt import Part
from server.schemas import fewshot, generation, stored
from server.schemas.base import Schema
from server.schemas.keys import LimitFields
from server.schemas.models import EmbeddingsRequest, InspectRequest
from server.schemas.prompt import Part as ServerPart
from server.schemas.stored import EvaluateRequest

# The client sets these two fields for streams.
STREAMING = {"stream", "stream_options"}
# The server has two names for this field.
ANSWER = {"answer"}

PAIRS: list[tuple[Any, type[Schema], set[str]]] = [
    (client.Options, generation.CompletionRequest, {"prompt", *STREAMING}),
    (client.FewShotOptions, fewshot.FewShotCompletionRequest, {"query", *STREAMING}),
    (client.ClassifyOptions, fewshot.ClassifyRequest, {"query"}),
    (client.ScoreOptions, fewshot.ScoreRequest, {"prompt", "candidates"}),
    (client.EmbedOptions, EmbeddingsRequest, {"input", "encoding_format"}),
    (client.InspectOptions, InspectRequest, {"prompt"}),
    (client.EvaluateOptions, EvaluateRequest, set()),
    (client.NewSet, stored.CreateRequest, set()),
    (client.SetChanges, stored.UpdateRequest, set()),
    (client.SearchOptions, fewshot.SearchRequest, {"query"}),
    (client.SuggestOptions, stored.SuggestRequest, {"pool"}),
    (client.WarmOptions, stored.WarmRequest, set()),
    (client.KeyLimits, LimitFields, set()),
    (client.Query, fewshot.QueryFields, set()),
    (client.Selection, fewshot.ExamplesFields, set()),
    (client.Template, fewshot.TemplateFields, set()),
    (client.Candidate, fewshot.LabelledCandidate, set()),
    (client.StructuredOutputs, generation.StructuredOutputs, set()),
]


@pytest.mark.parametrize(("options", "schema", "other_fields"), PAIRS, ids=[options.__name__ for options, *_ in PAIRS])
def test_options_match_the_fields_of_the_server(options: Any, schema: type[Schema], other_fields: set[str]) -> None:
    names = {field.alias or name for name, field in schema.model_fields.items()}
    assert get_type_hints(options).keys() == names - other_fields


def test_shots_and_examples_match_the_server() -> None:
    assert get_type_hints(client.Shot).keys() == fewshot.ShotFields.model_fields.keys() | ANSWER
    assert get_type_hints(client.Example).keys() == stored.ExampleFields.model_fields.keys() | ANSWER


@pytest.mark.parametrize(
    ("options", "field", "annotation"),
    [
        (client.Selection, "strategy", fewshot.Strategy),
        (client.Selection, "order", fewshot.Order),
        (client.SearchOptions, "strategy", fewshot.Comparing),
        (client.Options, "shots_attend", generation.CompletionRequest.model_fields["shots_attend"].annotation),
        *(
            (client.ClassifyOptions, name, fewshot.ClassifyRequest.model_fields[name].annotation)
            for name in ("normalisation", "calibration", "content_free")
        ),
    ],
)
def test_literal_values_match_the_server(options: Any, field: str, annotation: Any) -> None:
    assert leaves(get_type_hints(options)[field]) - {type(None)} == leaves(annotation)


def test_the_choices_of_the_command_line_are_those_of_the_server() -> None:
    fields = EvaluateRequest.model_fields
    choices = {"strategies": selection.Strategy, "methods": selection.EvaluatedMethod, "controls": selection.Control}
    for name, choice in choices.items():
        assert set(get_args(choice)) == leaves(fields[name].annotation)


def leaves(kind: Any) -> set[Any]:
    """Return the values of a literal or of nested unions of literals."""
    arguments = get_args(kind)
    return {leaf for argument in arguments for leaf in leaves(argument)} if arguments else {kind}


def test_prompt_parts_match_the_server() -> None:
    client_types = {get_args(get_type_hints(kind)["type"]) for kind in get_args(Part)}
    tagged = get_args(get_args(ServerPart)[0])
    server_types = {get_args(get_args(part)[0].model_fields["type"].annotation) for part in tagged}
    assert client_types == server_types
