"""The services that routes use: `create_app` creates them, and each route gets those of its caller's tenant.

Modules below `server.api` do not know this container: their functions take only the services that they use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request

from server.access.callers import Caller
from server.access.keys import Keys
from server.access.tenants import DEFAULT_TENANT
from server.api.paths import quoted_path
from server.api.writer import Writer
from server.engine_client.client import EngineClient
from server.errors import ModelNotFound, ServerError
from server.fewshot.comparison import Comparison
from server.fewshot.maintenance import WarmSets
from server.fewshot.retrieval import Retrieval
from server.fewshot.shots import ShotSource
from server.fewshot.warming import Warming
from server.limits.admission import Admission
from server.limits.resting_lock import RestingLock
from server.limits.shared_limit import SharedLimit
from server.limits.turns import REST, ThreadTurns
from server.media.intake import Intake
from server.media.pool import DecodePool
from server.media.store import MediaStore
from server.quality.curation import Curation
from server.quality.evaluation_store import Evaluations
from server.quality.recommendations import Recommendations
from server.served_model import ServedModel
from server.settings import Settings
from server.store.database import Database
from server.store.media_references import MediaReferences
from server.store.support_sets import SupportSets
from server.telemetry.metrics import Metrics
from server.telemetry.request_record import RequestRecord
from server.telemetry.stages import current
from server.weights import Weights

MAX_IMPORTS = 4
# a client may use three of the four
MAX_IMPORTS_SHARE = 0.75
# a remote store may be slow; a client may use two of them
STORAGE_THREADS = 16
# value of `Retry-After` for a refused import, in seconds
IMPORT_RETRY_AFTER = 10


@dataclass(frozen=True, slots=True)
class Services:
    settings: Settings
    model: ServedModel
    # the models at the same address, including this one
    catalog: Mapping[str, ServedModel]
    engine: EngineClient
    admission: Admission
    metrics: Metrics
    media_store: MediaStore
    intake: Intake
    decoder: DecodePool
    database: Database
    keys: Keys
    retrieval: Retrieval
    media_references: MediaReferences
    support_sets: SupportSets
    shots: ShotSource
    comparison: Comparison
    warming: Warming
    warm_sets: WarmSets
    evaluations: Evaluations
    recommendations: Recommendations
    curation: Curation
    weights: Weights
    # limits the rate of large bodies, whose validation blocks the event loop
    parsing: RestingLock = field(default_factory=RestingLock)
    writer: Writer = field(default_factory=Writer)
    # a scrape has a deadline: it does not wait for long answers
    exposition: ThreadTurns = field(default_factory=partial(ThreadTurns, 1, "metrics", rest=REST))
    # Threads for pages of the media store and pieces of archives. They cost no step of the engine, so a client pauses after
    # them.
    storage: ThreadTurns = field(
        default_factory=partial(ThreadTurns, STORAGE_THREADS, "storage", max_of_client=2, rest=REST)
    )
    # slots for archives that arrive or are being imported; their files are on disk
    imports: SharedLimit = field(
        default_factory=lambda: SharedLimit(
            MAX_IMPORTS, MAX_IMPORTS_SHARE, "archives that may be imported at once", lambda: IMPORT_RETRY_AFTER
        )
    )

    def with_salt(self, cache_salt: str | None) -> Services:
        """Return the services of a request that shares caches only with those of the same `cache_salt`."""
        if cache_salt is None:
            return self
        engine = self.engine.salted("request", cache_salt)
        retrieval = replace(self.retrieval, engine=engine)
        return replace(
            self,
            engine=engine,
            retrieval=retrieval,
            shots=replace(self.shots, retrieval=retrieval),
            comparison=replace(self.comparison, retrieval=retrieval),
        )

    async def expose_metrics(self) -> bytes:
        """Return the metrics in the text format of Prometheus, which a thread writes."""
        self.metrics.last_step_age.set(self.engine.step_age)
        return await self.exposition(partial(self.metrics.expose, with_vllm_names=self.settings.vllm_metrics))

    def model_not_found(self, name: str) -> ModelNotFound:
        names = ", ".join(map(repr, self.catalog))
        return ModelNotFound(f"the model {name[:128]!r} does not exist: this server has {names}", param="model")


def count_failure(request: Request, error: ServerError) -> None:
    """Count a request that ends with an error, also in its stream, and note the error's code for its trace."""
    caller: Caller | None = getattr(request.state, "caller", None)  # None if it was refused before it was identified
    services: Services = request.app.state.services
    services.metrics.count_refused(error.code, DEFAULT_TENANT if caller is None else caller.tenant)
    current.get().describe({"error": error.code})


async def _services(request: Request) -> Services:
    caller: Caller = request.state.caller
    services: Services = request.app.state.tenants.of(caller.tenant)
    return services


async def _record(request: Request, services: Annotated[Services, Depends(_services)]) -> RequestRecord:
    caller: Caller = request.state.caller
    state, path = request.state, quoted_path(request.scope)
    return RequestRecord(state.request_id, services.metrics, state.ticket, caller.quota, path)


GivenServices = Annotated[Services, Depends(_services)]
GivenRecord = Annotated[RequestRecord, Depends(_record)]
