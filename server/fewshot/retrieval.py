"""RICES: finds the examples most similar to a query, by features of the frozen vision encoder, the language model, or both.

Examples are embedded once for all servers that share a database. The database keys their vectors by the fingerprint of the
weights, their format unless it is native, and the version of the decoding. A version of a support set never changes, so its
index is built once.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Literal

import numpy as np
from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from model.likeness import Likeness, Vectors, unit
from model.media import DECODING
from server.access.tenants import DEFAULT_TENANT, qualified, split
from server.engine_client.client import EngineClient
from server.errors import DatabaseUnavailable, InvalidRequest
from server.fewshot.recent import Recent
from server.fewshot.vector_index import Similar, VectorIndex
from server.media.source import EncodedMedia
from server.media.store import MediaStore
from server.prompt import encode_text
from server.schemas.fewshot import Strategy
from server.served_model import ServedModel
from server.store.database import Database, chunked
from server.store.records import EmbeddingRow, Example, SupportSet
from server.store.retention import delete_old

logger = logging.getLogger(__name__)

Space = Literal["media", "text"]

# the score over several spaces is the mean
SPACES: dict[Strategy, tuple[Space, ...]] = {
    "rices_image": ("media",),
    "rices_text": ("text",),
    "mixed": ("media", "text"),
}
# number of items that are embedded in one call, and stored before the next call
BATCH = 32
# of the features of recent queries
QUERY_BYTES = 4 * 2**20
# older vectors are deleted: their weights or texts may no longer be in use
RETENTION_SECONDS = 30 * 24 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SimilarityQuery:
    """The media and text that examples are compared with."""

    media: Sequence[EncodedMedia]
    text: str


# returns the most similar examples, as many as its argument, best first; it takes milliseconds for a large set
Search = Callable[[int], list[Similar]]


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Ranks examples by similarity; `observe` receives the seconds of each search, after its query is embedded.

    `queries` has the features of recent queries: a request may compare its query for its shots and for each question.
    """

    engine: EngineClient
    model: ServedModel
    embeddings: EmbeddingStore
    store: MediaStore
    observe: Callable[[float], None] = lambda seconds: None
    indexes: Recent[VectorIndex] = field(default_factory=Recent)
    queries: Recent[Vectors] = field(default_factory=partial(Recent, QUERY_BYTES, attrgetter("nbytes")))

    async def most_similar(
        self, support_set: SupportSet, strategy: Strategy, query: SimilarityQuery, k: int
    ) -> list[Similar]:
        """Return the `k` most similar examples, best first.

        Raises what `check_comparable` raises, and the engine's errors.
        """
        if not support_set.examples:
            return []
        return await self.model.tokenize(await self.search(support_set, strategy, query), k)

    async def search(self, support_set: SupportSet, strategy: Strategy, query: SimilarityQuery) -> Search:
        """Return the search for the examples that are most similar to a query, in a set that is not empty.

        Raises what `check_comparable` raises, and the engine's errors.
        """
        _check_query(strategy, query)
        features = {space: await self._query_features(space, query) for space in SPACES[strategy]}
        index = await self._index(support_set, strategy)

        def search(k: int) -> list[Similar]:
            began = time.monotonic()
            similar = index.search(_vector_of_query(features, self.model.likeness), k)
            self.observe(time.monotonic() - began)
            return similar

        return search

    async def embed_media(self, media_ids: Sequence[str]) -> dict[str, Vectors]:
        """Return the features of stored media by id, and store new ones. Raises `MediaNotFound` and the engine's errors."""
        return await self._vectors(media_ids, self._embed_stored, is_stored=True)

    async def example_vectors(self, examples: Sequence[Example], likeness: Likeness | None = None) -> Vectors:
        """Return the vectors [N, D] of the examples' media, by a likeness or else the model's.

        Raises what `embed_media` raises.
        """
        keys = [example.media for example in examples]
        features = await self.embed_media([*dict.fromkeys(chain.from_iterable(keys))])
        return await asyncio.to_thread(_compared_vectors, keys, features, likeness or self.model.likeness)

    async def embed_query(self, media: Sequence[EncodedMedia]) -> Vectors:  # -> [M, Dv]
        """Return the features of a query's media, not from the database: a prompt that shows them needs them encoded.

        Raises the engine's errors.
        """
        distinct = {item.id: item for item in media}

        async def build() -> Vectors:
            return await self.engine.embed([*distinct.values()])

        return await self.queries.get((self.engine.salt, *distinct, self.embedder), build)

    async def query_vector(self, media: Sequence[EncodedMedia]) -> Vectors:
        """Return the vector [D] of a query's media. Raises the engine's errors."""
        features = await self.embed_query(media)
        return await asyncio.to_thread(_vector_of_query, {"media": features}, self.model.likeness)

    async def media_vectors(self, groups: Sequence[Sequence[EncodedMedia]]) -> Vectors:
        """Return one vector per group of media, [N, D]; new ones are not stored. Raises the engine's errors."""
        media = {item.id: item for group in groups for item in group}
        features = await self._vectors(media, lambda names: self.engine.embed([media[name] for name in names]))
        keys = [[item.id for item in group] for group in groups]
        return await asyncio.to_thread(_compared_vectors, keys, features, self.model.likeness)

    async def embed_texts(self, examples: Sequence[Example]) -> dict[str, Vectors]:
        """Return the vectors of the examples' texts, and store new ones. Raises the engine's errors."""
        texts = [compared_text(example.question, example.text) for example in examples]
        ids = await self.model.tokenize(self._all_ids, list(filter(None, texts)))
        return await self._text_vectors(ids, is_stored=True)

    def batches(self, support_set: SupportSet, space: Space) -> list[Callable[[], Awaitable[object]]]:
        """Return the work to embed the examples in a space and to store the vectors, in pieces of one batch."""
        examples, media = support_set.examples, support_set.media
        if space == "media":
            return [partial(self.embed_media, media[start : start + BATCH]) for start in range(0, len(media), BATCH)]
        return [partial(self.embed_texts, examples[start : start + BATCH]) for start in range(0, len(examples), BATCH)]

    async def _index(self, support_set: SupportSet, strategy: Strategy) -> VectorIndex:
        async def build() -> VectorIndex:
            vectors = [await self._example_vectors(support_set, space, strategy) for space in SPACES[strategy]]
            return await asyncio.to_thread(lambda: VectorIndex(_joined(vectors)))

        return await self.indexes.get((support_set.id, support_set.version, strategy, self.embedder), build)

    @property
    def embedder(self) -> str:
        """The key of everything, apart from its input, on which a vector and fits to vectors depend."""
        numbers, weight_format = self.engine.info.get("dtype", ""), self.engine.info.get("weight_format", "native")
        if weight_format != "native":
            numbers += f"-{weight_format}"
        return f"{self.model.fingerprint}-{numbers}-mean-{DECODING}"

    async def _query_features(self, space: Space, query: SimilarityQuery) -> Vectors:  # -> [M, D]
        """Return the features of the query's media, or the vector of its text."""
        if space == "text":
            ids = await self.model.tokenize(encode_text, query.text, self.model, "query")
            return np.stack([*(await self._text_vectors([ids], is_stored=False)).values()])
        return await self.embed_query(query.media)

    async def _example_vectors(self, support_set: SupportSet, space: Space, strategy: Strategy) -> Vectors:
        """Return one vector per example, [N, D]; the work for a large set runs in threads, not in the event loop."""
        examples = support_set.examples
        _check_examples(examples, space, strategy, "examples.strategy")
        if space == "media":
            return await self.example_vectors(examples)
        texts = [compared_text(example.question, example.text) for example in examples]
        ids = await self.model.tokenize(self._all_ids, texts)
        keys = [[_text_key(of_text)] for of_text in ids]
        return await asyncio.to_thread(_means, keys, await self._text_vectors(ids, is_stored=True))

    def _all_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [encode_text(text, self.model, "examples.support_set") for text in texts]

    async def _text_vectors(self, texts: Iterable[list[int]], *, is_stored: bool) -> dict[str, Vectors]:
        ids = {_text_key(text): text for text in texts}
        return await self._vectors(
            ids, lambda keys: self.engine.embed_text([ids[key] for key in keys]), is_stored=is_stored
        )

    async def _embed_stored(self, media_ids: Sequence[str]) -> Vectors:
        media = await asyncio.to_thread(lambda: [self.store.find(name, "examples.support_set") for name in media_ids])
        return await self.engine.embed(media)

    async def _vectors(
        self, keys: Iterable[str], embed: Callable[[Sequence[str]], Awaitable[Vectors]], *, is_stored: bool = False
    ) -> dict[str, Vectors]:
        """Return vectors by key; new ones are stored if `is_stored`, which is False for queries: they may never repeat.

        None is stored after the first failure, which may have taken all the time that a database call may take.
        """
        keys = list(keys)
        vectors = await self.embeddings.get(keys, self.embedder)
        missing = [key for key in keys if key not in vectors]
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            new = dict(zip(batch, await embed(batch), strict=True))
            is_stored = is_stored and await self._store(new)
            vectors |= new
        return vectors

    async def _store(self, vectors: Mapping[str, Vectors]) -> bool:
        """Store vectors and return whether it was possible: a request does not fail because a disk is full."""
        try:
            await self.embeddings.put(vectors, self.embedder)
        except DatabaseUnavailable as error:
            logger.warning("vectors of a support set could not be stored", extra={"error": error.message})
            return False
        return True


def _vector_of_query(features: Mapping[Space, Vectors], likeness: Likeness) -> Vectors:  # -> [D]
    """Return the vector of a query from its features by space; `likeness` is that of media."""
    likenesses: Mapping[Space, Likeness] = {"media": likeness, "text": unit}
    return _joined(_mean(likenesses[space](vectors)) for space, vectors in features.items())


def compared_text(question: str, text: str) -> str:
    """Return the question or, without one, the text: a question describes the task better than its answer does."""
    return question or text


def check_comparable(support_set: SupportSet, strategy: Strategy, query: SimilarityQuery) -> None:
    """Check that a search's query and all examples have the media or text that the strategy compares.

    Raises `InvalidRequest`.
    """
    _check_query(strategy, query)
    for space in SPACES[strategy]:
        _check_examples(support_set.examples, space, strategy, "strategy")


def _check_query(strategy: Strategy, query: SimilarityQuery) -> None:
    spaces = SPACES[strategy]
    if "text" in spaces and not query.text:
        raise _refusal(strategy, "text", "the query", "query")
    if "media" in spaces and not query.media:
        raise _refusal(strategy, "media", "the query", "query")


def _check_examples(examples: Sequence[Example], space: Space, strategy: Strategy, param: str) -> None:
    for example in examples:
        if not (example.media if space == "media" else compared_text(example.question, example.text)):
            raise _refusal(strategy, space, f"the example {example.id!r}", param)


def _refusal(strategy: Strategy, space: Space, owner: str, param: str) -> InvalidRequest:
    lack = f"media, but {owner} has none" if space == "media" else f"texts, but {owner} has neither question nor text"
    return InvalidRequest(f"{strategy} compares {lack}", param=param)


def _text_key(ids: list[int]) -> str:
    return "txt_" + hashlib.blake2b(np.array(ids, "<u4").tobytes(), digest_size=32).hexdigest()


def _mean(vectors: Sequence[Vectors] | Vectors) -> Vectors:
    """Return the mean direction [D], of length one: all media of a shot have equal weight."""
    return unit(np.mean(vectors, axis=0, dtype=np.float32))


def _compared_vectors(keys: Sequence[Sequence[str]], features: Mapping[str, Vectors], likeness: Likeness) -> Vectors:
    """Return the mean vector [D] of each group of media, [N, D]; `features` has those of all media by their keys."""
    vectors = likeness(np.stack([*features.values()])) if features else ()
    return _means(keys, dict(zip(features, vectors, strict=True)))


def _means(keys: Sequence[Sequence[str]], vectors: dict[str, Vectors]) -> Vectors:  # -> [N, D]
    return np.stack([_mean([vectors[key] for key in dict.fromkeys(example)]) for example in keys])


def _joined(vectors: Iterable[Vectors]) -> Vectors:
    """Concatenate vectors of several spaces, so that their inner product is the mean of those in the spaces."""
    return unit(np.concatenate([*vectors], axis=-1))


class EmbeddingStore:
    """A tenant's vectors in the database; `keys` are media ids or digests of texts, `model` the weights' fingerprint."""

    def __init__(self, database: Database, tenant: str = DEFAULT_TENANT) -> None:
        self._database = database
        self._tenant = tenant

    def of(self, tenant: str) -> EmbeddingStore:
        return EmbeddingStore(self._database, tenant)

    async def get(self, keys: Iterable[str], model: str) -> dict[str, Vectors]:
        """Return the stored vectors [D] of these keys."""
        unique = list(dict.fromkeys(qualified(self._tenant, key) for key in keys))
        return await self._database.read(lambda session, now: _stored_vectors(session, unique, model))

    async def put(self, vectors: Mapping[str, Vectors], model: str) -> None:
        """Store vectors [D] whose keys are not stored yet."""

        def add(session: Session, now: float) -> None:
            stored = _stored_vectors(session, [qualified(self._tenant, key) for key in vectors], model)
            rows = [
                {
                    "key": qualified(self._tenant, key),
                    "model": model,
                    "vector": vector.astype("<f4").tobytes(),
                    "created_at": now,
                }
                for key, vector in vectors.items()
                if key not in stored
            ]
            if rows:
                session.execute(insert(EmbeddingRow), rows)

        await self._database.write(add)

    async def sweep(self) -> None:
        """Delete the vectors of all tenants that are older than `RETENTION_SECONDS`."""
        await delete_old(self._database, EmbeddingRow, RETENTION_SECONDS)


def _stored_vectors(session: Session, keys: Sequence[str], model: str) -> dict[str, Vectors]:
    """Return the stored vectors of qualified keys, by the tenant's own keys."""
    vectors: dict[str, Vectors] = {}
    for chunk in chunked(keys):
        query = select(EmbeddingRow.key, EmbeddingRow.vector)
        rows = session.execute(query.where(EmbeddingRow.model == model, EmbeddingRow.key.in_(chunk)))
        vectors.update((split(key)[1], np.frombuffer(vector, dtype="<f4")) for key, vector in rows)
    return vectors
