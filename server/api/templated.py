"""What a template means to a request that generates: where its answer ends, and what a form of it begins with."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from server.fewshot.templates import Template
from server.schemas.completions import GenerationFields, StructuredOutputs
from server.served_model import ServedModel

FieldsType = TypeVar("FieldsType", bound=GenerationFields)


def in_template(fields: FieldsType, template: Template, model: ServedModel) -> FieldsType:
    """The request as the template has it: it ends where a shot ends, and a form begins with what leads to an answer."""
    changes: dict[str, Any] = {}
    if template.end and "stop" not in fields.model_fields_set:
        changes["stop"] = [template.end]
    if not template.end and (end := model.config.prompt.end_of_chunk) not in model.config.prompt.eos:
        changes["stop_token_ids"] = [*fields.stop_token_ids, model.tokenizer.id_of(end)]
    if template.lead:
        changes["structured_outputs"] = _led(fields.structured_outputs, template.lead)
    return fields.model_copy(update=changes)


def _led(form: StructuredOutputs, lead: str) -> StructuredOutputs:
    """JSON may begin with spaces as it is."""
    if form.choice:
        return form.model_copy(update={"choice": [lead + choice for choice in form.choice]})
    if form.regex:
        return form.model_copy(update={"regex": f"{re.escape(lead)}(?:{form.regex})"})
    return form
