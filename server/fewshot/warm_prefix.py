"""What a few-shot prompt of a support set begins with: its first examples in their order, as a template writes them.

A request with the strategy "first" and the same template and `k` then finds all its shots computed.
"""

from __future__ import annotations

from server.errors import ContextLengthExceeded, InvalidRequest
from server.fewshot.prompting import template_of, write
from server.fewshot.retrieval import SimilarityQuery
from server.fewshot.shots import chosen_shots
from server.fewshot.templates import Query
from server.fewshot.warming import Prefix
from server.schemas.fewshot import FewShotFields, TemplateChoice
from server.services import Services
from server.store.records import SupportSet

# stands where a query's own words will: whole blocks before it are what is kept
ANY_QUERY = Query(text="?", question="?")


async def prefix_of(support_set: SupportSet, choice: TemplateChoice, k: int | None, services: Services) -> Prefix:
    """`k` None: as many as a request that does not say. Raises `InvalidRequest` for what the template cannot show."""
    template = template_of(choice, services.model.config)
    wanted = {"support_set": support_set.id, "version": support_set.version, "k": k, "order": "stored"}
    fields = FewShotFields.model_validate({"query": {}, "examples": wanted, "template": choice})
    assert fields.examples is not None
    try:
        found = await chosen_shots(fields, fields.examples, template, SimilarityQuery(media=(), text=""), services, ())
    except InvalidRequest as error:
        error.param = "k" if error.param == "examples.k" else "template"
        raise
    prompt = write(template, found.shots, ANY_QUERY, found.media, services.model.tokenizer)
    if prompt.num_tokens > services.model.max_model_len:
        raise ContextLengthExceeded(
            f"{len(found.shots)} shots have {prompt.num_tokens} tokens, this model reads {services.model.max_model_len}",
            param="k",
        )
    return Prefix(prompt.encoded, prompt.media)
