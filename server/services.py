"""What requests are served with, handed to whoever serves one as an argument. Made once by `create_app`."""

from __future__ import annotations

from dataclasses import dataclass

from server.admission import Admission
from server.engine_client.client import Client
from server.errors import ModelNotFound
from server.fewshot.retrieval import Retrieval
from server.fewshot.warming import Warming
from server.media.intake import Intake
from server.media.pool import DecodePool
from server.media.store import MediaStore
from server.metrics import Metrics
from server.quality.evaluation_store import Evaluations
from server.served_model import ServedModel
from server.settings import Settings
from server.store.database import Database
from server.store.embeddings import EmbeddingStore
from server.store.media_references import MediaReferences
from server.store.support_sets import SupportSets


@dataclass(frozen=True, slots=True)
class Services:
    settings: Settings
    model: ServedModel
    client: Client
    admission: Admission
    metrics: Metrics
    store: MediaStore
    media: Intake
    decoder: DecodePool
    database: Database
    media_references: MediaReferences
    embeddings: EmbeddingStore
    support_sets: SupportSets
    warming: Warming
    evaluations: Evaluations
    retrieval: Retrieval

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model.name:
            raise ModelNotFound(f"the model {name[:128]!r} does not exist: this server has {self.model.name!r}")
