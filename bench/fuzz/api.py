"""Runs schemathesis against the served OpenAPI document: each operation alone, then chains of operations by their links.

Schemathesis runs in its own process, round after round with new seeds, until enough cases were sent. A 503 is no failure,
because a server may be overloaded, unless it says that the worker died. Nor is a 504 to a request with a deadline.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.driver import BenchFailed
from bench.table import ROOT, Bar, Report
from bench.target import START_SECONDS, Target, get, wait_until
from server.settings import child_environment

# checks of responses, without those for the strictness of schemas, which do not know rules between two fields
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "the_worker_survives",
    "only_a_stated_deadline_passes",
)
# a chain of operations continues only after an accepted request
CONFIGURATION = """\
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503, 504]
[phases.stateful.generation]
mode = "positive"
"""
HOOKS = "bench.fuzz.checks"
EVENTS = "text/event-stream"
# the operations whose responses name what other operations take, as method, path, status, and values by parameter
SET = {"support_set": "$request.path.support_set"}
LINKS: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    ("post", "/v1/support_sets/{support_set}/evaluate", "202", {"evaluation_id": "$response.body#/id"}),
    ("get", "/v1/evaluations", "200", {"evaluation_id": "$response.body#/data/0/id"}),
    ("get", "/v1/support_sets/{support_set}/examples", "200", {**SET, "example_id": "$response.body#/data/0/id"}),
)
MAX_ROUNDS = 1000
ROUND_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Round:
    """The cases and failures of one run of schemathesis."""

    num_cases: int
    failures: Counter[str]
    text: str


def run(target: Target, num_cases: int, *, seed: int = 0, phases: str = "examples,coverage,fuzzing,stateful") -> Report:
    """Send at least `num_cases` cases and report what failed."""
    report = Report("Cases made from the OpenAPI document", {"cases": num_cases, "seed": seed}, ("schemathesis",))
    failures, sent = Counter[str](), 0
    restarts = target.gauges()["engine_restarts_total"]
    for number in range(MAX_ROUNDS):
        wait_until(target.is_ready, START_SECONDS, "a ready server")
        # the first round tries each value at the border of a schema; later rounds draw values
        result = run_round(target, seed + number, max_examples=20 if number == 0 else 200, phases=phases)
        sent, failures = sent + result.num_cases, failures + result.failures
        print(result.text if result.failures else f"round {number}: {result.num_cases} cases")
        if sent >= num_cases:
            break
    for name, count in failures.items():
        report.add({"failure": name, "times": count})
    report.add({"failure": "all cases", "times": sent})
    report.bars += [
        Bar(name="cases", value=sent, at_least=num_cases),
        Bar(name="failures", value=failures.total(), at_most=0),
        Bar(name="restarts of the worker", value=target.gauges()["engine_restarts_total"] - restarts, at_most=0),
    ]
    return report


def run_round(target: Target, seed: int, *, max_examples: int, phases: str, include: str = "") -> Round:
    """Run schemathesis once. `include` is a regular expression of paths."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in ("openapi.json", "configuration.toml", "report.json")}
        files["openapi.json"].write_text(
            json.dumps(with_links(with_event_schemas(target.send(get("/openapi.json")).json())))
        )
        files["configuration.toml"].write_text(CONFIGURATION)
        process = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "--config-file", files["configuration.toml"], "run"),
                *(files["openapi.json"], "--url", f"http://{target.host}:{target.port}"),
                *("--checks", ",".join(CHECKS), "--phases", phases, "--max-examples", str(max_examples)),
                *("--seed", str(seed), "--generation-database", "none", "--no-shrink", "--continue-on-failure"),
                *("--suppress-health-check", "all", "--warnings", "off", "--no-color", "--request-timeout", "60"),
                *("--report", "json", "--report-json-path", files["report.json"]),
                *(("--include-path-regex", include) if include else ()),
            ],
            capture_output=True,
            text=True,
            timeout=ROUND_SECONDS,
            check=False,
            cwd=folder,  # it keeps files of its own there
            env=child_environment(SCHEMATHESIS_HOOKS=HOOKS, PYTHONPATH=str(ROOT)),
        )
        if not files["report.json"].exists():
            raise BenchFailed(f"schemathesis ended with status {process.returncode}:\n{process.stderr[-4000:]}")
        return _round(json.loads(files["report.json"].read_text()), process.stdout)


def _round(report: dict[str, Any], text: str) -> Round:
    failures = Counter[str]()
    for failure in report["failures"]:
        failures[f"{failure['title']}: {', '.join(failure['operations'])}"] += failure["count"]
    for error in report["errors"]:
        failures[f"error: {error['title']}"] += error["count"]
    if report["stop_reason"] != "completed":
        failures[f"stopped: {report['stop_reason']}"] += 1
    return Round(report["test_cases"]["generated"], failures, text)


def with_event_schemas(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with schemas of events in the form that schemathesis reads: the data as JSON in a string.

    OpenAPI 3.1 does not say what the schema of a stream describes; ours is that of the JSON in the data of an event.
    """
    for operations in document["paths"].values():
        for operation in operations.values():
            for response in operation["responses"].values():
                content = response.get("content", {})
                if EVENTS in content:
                    content[EVENTS] = {"schema": _event_schema(content[EVENTS]["schema"])}
    return document


def with_links(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with links that schemathesis does not infer itself."""
    for method, path, status, values in LINKS:
        response = document["paths"].get(path, {}).get(method, {}).get("responses", {}).get(status)
        if response is not None:
            response["links"] = {
                name: {"operationId": name, "parameters": values} for name in _taking(document, values.keys())
            }
    return document


def _taking(document: dict[str, Any], names: Set[str]) -> list[str]:
    """Return the ids of the operations that have exactly these parameters in their path."""
    return [
        operation["operationId"]
        for operations in document["paths"].values()
        for operation in operations.values()
        if {p["name"] for p in operation.get("parameters", ()) if p["in"] == "path"} == names
    ]


def _event_schema(chunk: dict[str, Any]) -> dict[str, Any]:
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": chunk}
    end = {"type": "string", "const": "[DONE]"}
    return {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": [end, data]}}}
