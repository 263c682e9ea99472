"""The services of each tenant: the same for all, but with the tenant's own rows, files, uploads and caches.

They are created when a tenant first occurs: in one of its keys, or in an evaluation or a support set in the database.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from server.access.tenants import DEFAULT_TENANT
from server.api.services import Services
from server.fewshot.maintenance import WarmSets
from server.fewshot.warming import Warming


class Tenants:
    """The services of all tenants, derived from those of the default tenant."""

    def __init__(self, services: Services) -> None:
        self._services = {DEFAULT_TENANT: services}

    def of(self, tenant: str) -> Services:
        if tenant not in self._services:
            self._services[tenant] = _services_of(tenant, self._services[DEFAULT_TENANT])
        return self._services[tenant]

    def known(self) -> Collection[Services]:
        """Return the services that were created."""
        return self._services.values()

    def warm_sets(self, named: Iterable[str]) -> Mapping[str, WarmSets]:
        """Return the warm sets of the known tenants and of those in `named`, by tenant."""
        for tenant in named:
            self.of(tenant)
        return {tenant: services.warm_sets for tenant, services in self._services.items()}


def _services_of(tenant: str, services: Services) -> Services:
    engine = services.engine if services.settings.share_caches else services.engine.salted("tenant", tenant)
    media_store, evaluations = services.media_store.of(tenant), services.evaluations.of(tenant)
    references = services.media_references.of(media_store)
    support_sets, intake = services.support_sets.of(tenant, references), services.intake.of(media_store)
    embeddings = services.retrieval.embeddings.of(tenant)
    retrieval = replace(services.retrieval, engine=engine, embeddings=embeddings, store=media_store)
    comparison = replace(services.comparison, retrieval=retrieval)
    warming = Warming(comparison, services.warming.slots, services.warming.turns)
    return replace(
        services,
        engine=engine,
        media_store=media_store,
        intake=intake,
        media_references=references,
        support_sets=support_sets,
        retrieval=retrieval,
        shots=replace(services.shots, intake=intake, support_sets=support_sets, retrieval=retrieval),
        comparison=comparison,
        warming=warming,
        warm_sets=WarmSets(support_sets, warming),
        evaluations=evaluations,
        recommendations=replace(services.recommendations, evaluations=evaluations),
        curation=replace(services.curation, retrieval=retrieval),
    )
