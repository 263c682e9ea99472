"""Client and server say the same: every field of the server's requests is an option, and none is invented."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest

import flamboyance_client as client
from flamboyance_client.prompt import Part
from server.api.routes.evaluations import EvaluateRequest
from server.api.routes.fewshot import FewShotCompletionRequest
from server.api.routes.inspect import InspectRequest
from server.schemas import classify as schemas_classify
from server.schemas import completions as schemas
from server.schemas import fewshot as fields
from server.schemas import support_sets as schemas_support_sets
from server.schemas.base import Schema

# the client sets these two where a stream is asked for
STREAMING = {"stream", "stream_options"}
# on the server two names of one field
ANSWER = {"answer"}

PAIRS: list[tuple[Any, type[Schema], set[str]]] = [
    (client.Options, schemas.CompletionRequest, {"prompt", *STREAMING}),
    (client.FewShotOptions, FewShotCompletionRequest, {"query", *STREAMING}),
    (client.ClassifyOptions, schemas_classify.ClassifyRequest, {"query"}),
    (client.ScoreOptions, schemas_classify.ScoreRequest, {"prompt", "candidates"}),
    (client.InspectOptions, InspectRequest, {"prompt"}),
    (client.EvaluateOptions, EvaluateRequest, set()),
    (client.NewSet, schemas_support_sets.CreateRequest, set()),
    (client.SetChanges, schemas_support_sets.UpdateRequest, set()),
    (client.SearchOptions, fields.SearchRequest, {"query"}),
    (client.WarmOptions, schemas_support_sets.WarmRequest, set()),
    (client.Query, fields.QueryFields, set()),
    (client.Selection, fields.ExamplesFields, set()),
    (client.Template, fields.TemplateFields, set()),
    (client.Candidate, schemas_classify.LabelledCandidate, set()),
    (client.StructuredOutputs, schemas.StructuredOutputs, set()),
]


@pytest.mark.parametrize(("ours", "theirs", "apart"), PAIRS, ids=[ours.__name__ for ours, *_ in PAIRS])
def test_the_options_are_the_servers_fields(ours: Any, theirs: type[Schema], apart: set[str]) -> None:
    names = {field.alias or name for name, field in theirs.model_fields.items()}
    assert get_type_hints(ours).keys() == names - apart


def test_a_shot_and_an_example_are_the_servers() -> None:
    assert get_type_hints(client.Shot).keys() == fields.ShotFields.model_fields.keys() | ANSWER
    assert get_type_hints(client.Example).keys() == schemas_support_sets.ExampleFields.model_fields.keys() | ANSWER


@pytest.mark.parametrize(
    ("kind", "field", "theirs"),
    [
        (client.Selection, "strategy", fields.Strategy),
        (client.Selection, "order", fields.Order),
        (client.SearchOptions, "strategy", fields.Comparing),
        *(
            (client.ClassifyOptions, name, schemas_classify.ClassifyRequest.model_fields[name].annotation)
            for name in ("normalisation", "calibration", "content_free")
        ),
    ],
)
def test_choices_are_the_servers(kind: Any, field: str, theirs: Any) -> None:
    assert leaves(get_type_hints(kind)[field]) - {type(None)} == leaves(theirs)


def leaves(kind: Any) -> set[Any]:
    """The values of a literal, of any depth of unions."""
    found = get_args(kind)
    return {leaf for one in found for leaf in leaves(one)} if found else {kind}


def test_the_parts_are_the_servers_parts() -> None:
    ours = {get_args(get_type_hints(kind)["type"]) for kind in get_args(Part)}
    tagged = get_args(get_args(schemas.Part)[0])
    theirs = {get_args(get_args(part)[0].model_fields["type"].annotation) for part in tagged}
    assert ours == theirs
