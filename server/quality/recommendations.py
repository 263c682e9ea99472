"""Finds what the latest evaluation of a support set recommends, for requests that leave the method to the server."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from model.prompt import ShotsAttend
from server.fewshot.confidence import Confidence
from server.fewshot.methods import IN_CONTEXT, METHODS
from server.fewshot.recent import Recent
from server.object_size import size_of
from server.quality.evaluation_records import Evaluation
from server.quality.evaluation_store import Evaluations
from server.quality.recommendation import baseline, recommend, summarise
from server.schemas.fewshot import SELECTING, ClassifyRequest, ExamplesFields, Method, ShotsFields, WeighingFields
from server.schemas.responses.evaluations import CurvePoint
from server.store.records import SupportSet

# the template of evaluations whose prompts are recommended: that of a request which says nothing of its own
EVALUATED_TEMPLATE = "classification"
QUERY_FIELDS = ("model", "template", "candidates")
PROMPT_FIELDS = tuple(name for name in WeighingFields.model_fields if name != "seed")
# seconds after which the database is asked again, since an evaluation may have completed
KEPT_SECONDS = 10.0
# of what was found, also in periods that are over
MAX_BYTES = 4 * 2**20
# of an entry: its key and its objects
OVERHEAD_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Recommended:
    """A method, with the shots of its prompt if it has one; both were evaluated for classifications with these labels.

    `confidence` is what the evaluation fitted. `is_compared` is False if requests could use methods by likeness and none
    was measured.
    """

    method: Method
    examples: ExamplesFields
    labels: frozenset[str]
    confidence: Confidence
    shots_attend: ShotsAttend = "previous"
    is_compared: bool = True

    def suits(self, fields: ClassifyRequest) -> bool:
        """Return whether `auto` may follow it: the method has no prompt, or was compared in the template of a request."""
        return self.method in METHODS or (self.is_compared and fields.template == EVALUATED_TEMPLATE)

    def is_of(self, method: str, selection: ShotsFields, fields: ClassifyRequest) -> bool:
        """Return whether a request has the method and the prompts that were evaluated, given its selection of shots."""
        weighing = WeighingFields(**fields.model_dump(include=set(WeighingFields.model_fields)))
        is_default = fields.template == EVALUATED_TEMPLATE and weighing == WeighingFields()
        has_all = not (fields.zero_shot or fields.truncate_shots)
        examples = selection.examples
        is_same = method == self.method and examples is not None and _shots(examples) == _shots(self.examples)
        return is_default and has_all and is_same and selection.shots_attend == self.shots_attend


@dataclass(frozen=True, slots=True)
class Found:
    """The recommendation for a version, if there is one."""

    recommended: Recommended | None

    @property
    def num_bytes(self) -> int:
        return OVERHEAD_BYTES + size_of(self.recommended)


@dataclass(frozen=True, slots=True)
class Recommendations:
    """The recommendations of the evaluations in the database."""

    evaluations: Evaluations
    recent: Recent[Found] = field(default_factory=lambda: Recent(MAX_BYTES))

    async def find(self, support_set: SupportSet, labels: Collection[str]) -> Recommended | None:
        """Return what is recommended for a version and these labels, if its latest evaluation was of the same labels."""

        async def build() -> Found:
            evaluation = await self.evaluations.latest(support_set.id, support_set.version)
            return Found(None if evaluation is None else _read(evaluation))

        period = int(time.monotonic() / KEPT_SECONDS)
        key = (support_set.id, support_set.version, self.evaluations.changes.number, period)
        recommended = (await self.recent.get(key, build)).recommended
        return recommended if recommended and recommended.labels == set(labels) else None


def recommendation_of(evaluation: Evaluation) -> dict[str, Any] | None:
    """Return what the finished cells of an evaluation recommend: nothing if it `lacks_likeness`."""
    cells, plan = list(evaluation.cells.values()), evaluation.plan
    if lacks_likeness(evaluation):
        return None
    always, settled = baseline(plan["truths"]), plan["settled"]
    chosen = recommend(cells, evaluation.support_set, evaluation.version, settled["order"], always, plan.get("prior"))
    if chosen is None:
        return None
    return chosen | {"request": chosen["request"] | _repeated(plan["request"], chosen["request"])}


def _repeated(request: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an evaluation's request that a request with the chosen setting has to repeat."""
    if chosen["method"] in METHODS:
        return {name: request[name] for name in QUERY_FIELDS if name in request}
    fields = {name: request[name] for name in (*QUERY_FIELDS, *PROMPT_FIELDS) if name in request}
    # the orders of the shots are drawn with the seed that selects them
    return fields | ({"seed": chosen["examples"]["seed"]} if "permutations" in fields else {})


def lacks_likeness(evaluation: Evaluation) -> bool:
    """Return whether an evaluation of all methods could measure none by likeness, although requests can use them."""
    return not evaluation.plan["request"].get("methods") and _is_of_prompts_alone(evaluation)


def _is_of_prompts_alone(evaluation: Evaluation) -> bool:
    """Return whether no method by likeness was measured, although requests can use them."""
    plan = evaluation.plan
    # an earlier version of the server stored neither this field nor the methods of cells
    return plan.get("comparable", False) and all(cell["method"] == IN_CONTEXT for cell in plan["settled"]["cells"])


def _read(evaluation: Evaluation) -> Recommended | None:
    recommendation, plan = recommendation_of(evaluation), evaluation.plan["settled"]
    if recommendation is None:
        return None
    request = recommendation["request"]
    if not (request["method"] in METHODS or _has_default_prompt(plan)):
        return None
    method, examples = request["method"], ExamplesFields(**request["examples"])
    labels = frozenset(candidate["label"] for candidate in plan["candidates"])
    attend: ShotsAttend = request.get("shots_attend", "previous")
    k, strategy = (request["examples"].get(name) for name in ("k", "strategy"))
    form = None if k is None else attend
    setting = {"method": method, "k": k, "strategy": strategy, "shots_attend": form, "control": None}
    rows = summarise(list(evaluation.cells.values()))
    row = next(row for row in rows if setting.items() <= row.items())
    confidence = Confidence(row["temperature"])
    if not unjudged_labels(evaluation):
        confidence = replace(
            confidence, curve=tuple(CurvePoint(**point) for point in row["curve"]), num_left_out=row["queries"]
        )
    return Recommended(method, examples, labels, confidence, attend, not _is_of_prompts_alone(evaluation))


def unjudged_labels(evaluation: Evaluation) -> list[str]:
    """Return the labels whose only example was not left out: a curve of abstention lacks queries like these."""
    judged = set(evaluation.plan["truths"])
    return [label for label in evaluation.plan.get("single", ()) if label not in judged]


def _shots(examples: ExamplesFields) -> tuple[object, ...]:
    return tuple(getattr(examples, name) for name in sorted(SELECTING))


def _has_default_prompt(plan: Mapping[str, Any]) -> bool:
    """Return whether an evaluation's prompts were written and weighed as those of a request that says nothing of it."""
    weighing = WeighingFields(**{**plan["weighing"], "seed": 0})
    return plan["template"] == EVALUATED_TEMPLATE and weighing == WeighingFields()
