"""The documents list exactly the settings, metrics, routes, fields and errors of the server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from fastapi.routing import APIRoute

from deploy.ray.replay import ReplicaLost
from server.api.guard import OPEN_PATHS
from server.app import ROUTERS
from server.errors import ServerError
from server.schemas.decisions import DecisionRequest
from server.schemas.fewshot import ClassifyRequest, FewShotFields
from server.schemas.generation import ChatRequest, CompletionRequest, GenerationFields
from server.schemas.models import EmbeddingsRequest, InspectRequest
from server.schemas.responses.curation import Diagnostics, Reason
from server.schemas.responses.stored import Warmth
from server.schemas.stored import DiagnosticsRequest, EvaluateRequest, SuggestRequest
from server.settings import Settings
from server.telemetry.metrics import Metrics

DOCS = Path(__file__).resolve().parents[2] / "docs"
API = (DOCS / "api.md").read_text(encoding="utf-8")
OPERATIONS = (DOCS / "operations.md").read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """Return the cells of all tables, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and "`" in line]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_setting_is_documented_with_its_default_and_description() -> None:
    documented = {names(row[0])[0]: row[1:] for row in rows(section(OPERATIONS, "Settings"))}
    actual = {
        name: ["none" if field.default is None else str(field.default), field.description]
        for name, field in Settings.model_fields.items()
    }
    assert documented == actual


def metrics() -> Iterator[tuple[str, list[str]]]:
    for family in Metrics("x").registry.collect():
        yield family.name + ("_total" if family.type == "counter" else ""), [family.type, family.documentation]


def test_every_metric_is_documented_with_its_type_and_help() -> None:
    documented = {names(row[0])[0]: row[1:] for row in rows(section(OPERATIONS, "Metrics"))}
    assert documented == dict(metrics())


def test_every_route_is_documented() -> None:
    documented = set(re.findall(r"`(?:GET|POST|PATCH|DELETE) (/[^`]*)`", API))
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    assert documented == {route.path.replace(":path", "") for route in routes} | {"/openapi.json"}
    assert all(f"`{path}`" in API for path in OPEN_PATHS)


def test_every_field_of_a_completion_is_documented() -> None:
    documented = [name for row in rows(section(API, "Fields of a completion")) for name in names(row[0])]
    assert sorted(documented) == sorted(CompletionRequest.model_fields)


def test_every_field_of_a_chat_is_documented() -> None:
    documented = {name for row in rows(section(API, "Chat")) for name in names(row[0])}
    shared = GenerationFields.model_fields.keys()
    assert documented == ChatRequest.model_fields.keys() - shared


def test_every_field_of_embeddings_and_inspections_is_documented() -> None:
    for title, schema in (("Embeddings", EmbeddingsRequest), ("Inspection", InspectRequest)):
        fields = section(API, title).partition("| response field")[0]
        assert {name for row in rows(fields) for name in names(row[0])} == schema.model_fields.keys()


def test_every_field_of_a_classification_is_documented() -> None:
    documented = {name for row in rows(section(API, "Classification")) for name in names(row[0])}
    assert documented == ClassifyRequest.model_fields.keys() - FewShotFields.model_fields.keys() | {"template"}


def test_every_field_of_a_decision_is_documented() -> None:
    fields = section(API, "Decisions").partition("**Input.**")[0]
    assert {name for row in rows(fields) for name in names(row[0])} == DecisionRequest.model_fields.keys()


def test_every_field_of_an_evaluation_is_documented() -> None:
    documented = {name for row in rows(section(API, "Evaluation of a support set")) for name in names(row[0])}
    assert documented >= EvaluateRequest.model_fields.keys()


def test_every_field_of_diagnostics_and_suggestions_is_documented() -> None:
    fields, _, response = section(API, "Diagnostics of a support set").partition("| response field")
    assert {name for row in rows(fields) for name in names(row[0])} == DiagnosticsRequest.model_fields.keys()
    documented = {name.partition(".")[0] for row in rows(response) for name in names(row[0])}
    assert documented == Diagnostics.model_fields.keys() - {"object", "support_set", "version"}
    fields, _, response = section(API, "Suggestions").partition("| response field")
    assert {name for row in rows(fields) for name in names(row[0])} == SuggestRequest.model_fields.keys()
    documented = {name.rpartition(".")[2] for row in rows(response) for name in names(row[0])}
    assert documented >= {"method", "data", "labels", "known", "repeated", *Reason.model_fields}


def classes(root: type[ServerError]) -> list[type[ServerError]]:
    return [root, *(descendant for child in root.__subclasses__() for descendant in classes(child))]


def test_every_field_of_warming_is_documented() -> None:
    documented = {name for row in rows(section(API, "Warming")) if len(row) == 2 for name in names(row[0])}
    expected = {f"warm.{name}" for name in Warmth.model_fields if name not in {"status", "error"}} | {"status"}
    assert documented == expected
    assert "`warm.error`" in section(API, "Warming")


def test_every_error_is_documented_with_its_status() -> None:
    documented = {(int(row[0]), code) for row in rows(section(API, "Errors")) for code in names(row[1])}
    kinds = classes(ServerError)
    assert ReplicaLost in kinds  # that of a fleet
    assert documented == {(kind.status, kind.code) for kind in kinds}
