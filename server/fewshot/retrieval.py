"""RICES: which examples are most like the query, by the frozen encoder's features, the language model's, or both.

Examples are embedded once, and their vectors kept in the database under the weights that made them; a version of a
support set never changes, so its index is built once.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from server.engine_client.client import Client
from server.errors import ContextLengthExceeded, InvalidRequest
from server.fewshot.selection import Similar
from server.fewshot.vector_index import RecentIndexes, VectorIndex, Vectors
from server.media.source import EncodedMedia
from server.media.store import MediaStore
from server.schemas.fewshot import Strategy
from server.served_model import ServedModel
from server.store.embeddings import EmbeddingStore
from server.store.records import Example, SupportSet

Space = Literal["media", "text"]

# of several spaces the score is the mean
SPACES: dict[Strategy, tuple[Space, ...]] = {
    "rices_image": ("media",),
    "rices_text": ("text",),
    "mixed": ("media", "text"),
}
# embedded in one call, and kept before the next one begins
BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class SimilarityQuery:
    """What examples are compared with."""

    media: Sequence[EncodedMedia]
    text: str


class Retrieval:
    def __init__(
        self,
        client: Client,
        model: ServedModel,
        embeddings: EmbeddingStore,
        store: MediaStore,
        took: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._client = client
        self._model = model
        self._embeddings = embeddings
        self._store = store
        self._took = took
        self._indexes = RecentIndexes()

    async def most_similar(
        self, found: SupportSet, strategy: Strategy, asked: SimilarityQuery, k: int
    ) -> list[Similar]:
        """The `k` most similar examples by their places, best first. Raises `InvalidRequest` for a query or an example
        without what is compared, and what the engine raises."""
        spaces = SPACES[strategy]
        if "text" in spaces and not asked.text:
            raise InvalidRequest(
                f"{strategy} compares texts, and the query has neither question nor text", param="query"
            )
        if "media" in spaces and not asked.media:
            raise InvalidRequest(f"{strategy} compares media, and the query has none", param="query")
        if not found.examples:
            return []
        started = time.monotonic()
        index = await self._index(found, strategy)
        query = _joined([await self._query_vector(space, asked) for space in spaces])
        similar = await asyncio.to_thread(index.search, query, k)
        self._took(time.monotonic() - started)
        return similar

    async def embed_media(self, media: Sequence[str]) -> int:
        """Compute and keep what vectors these stored media lack, before a request waits for them. Returns how many have
        one. Raises `MediaNotFound`, and what the engine raises."""
        return len(await self._media_vectors(media))

    async def embed_texts(self, found: SupportSet) -> int:
        """The same for the texts of the examples that have one. Raises `ContextLengthExceeded`."""
        texts = [compared_text(example.question, example.text) for example in found.examples]
        ids = await asyncio.to_thread(lambda: [self._text_ids(text, "examples.support_set") for text in texts if text])
        return len(await self._text_vectors(ids, is_kept=True))

    async def _index(self, found: SupportSet, strategy: Strategy) -> VectorIndex:
        async def vectors() -> Vectors:
            return _joined([await self._example_vectors(found, space, strategy) for space in SPACES[strategy]])

        return await self._indexes.get((found.id, found.version, strategy, self._embedder), vectors)

    @property
    def _embedder(self) -> str:
        """What a vector depends on besides what it is of."""
        return f"{self._model.fingerprint}-{self._client.info.get('dtype', '')}"

    async def _query_vector(self, space: Space, asked: SimilarityQuery) -> Vectors:
        """[D]"""
        if space == "text":
            return _mean(await self._text_vectors([self._text_ids(asked.text, "query")], is_kept=False))
        media = {one.id: one for one in asked.media}
        return _mean(await self._vectors(media, lambda names: self._client.embed([media[name] for name in names])))

    async def _example_vectors(self, found: SupportSet, space: Space, strategy: Strategy) -> Vectors:
        """[N, D], one of each example. A large set's own work is done beside the event loop."""
        if space == "text":
            texts = await asyncio.to_thread(self._example_texts, found, strategy)
            own = [[_text_key(ids)] for ids in texts]
            vectors = await self._text_vectors(texts, is_kept=True)
        else:
            own = [_media(example, strategy) for example in found.examples]
            vectors = await self._media_vectors(found.media)
        return await asyncio.to_thread(_means, own, vectors)

    def _example_texts(self, found: SupportSet, strategy: Strategy) -> list[list[int]]:
        return [self._text_ids(_text(example, strategy), "examples.support_set") for example in found.examples]

    async def _media_vectors(self, names: Sequence[str]) -> dict[str, Vectors]:
        return await self._vectors(names, self._embed_stored, is_kept=True)

    async def _text_vectors(self, texts: Iterable[list[int]], *, is_kept: bool) -> dict[str, Vectors]:
        ids = {_text_key(text): text for text in texts}
        return await self._vectors(
            ids, lambda keys: self._client.embed_text([ids[key] for key in keys]), is_kept=is_kept
        )

    async def _embed_stored(self, names: Sequence[str]) -> Vectors:
        media = await asyncio.to_thread(lambda: [self._store.find(name, "examples.support_set") for name in names])
        return await self._client.embed(media)

    async def _vectors(
        self, keys: Iterable[str], embed: Callable[[Sequence[str]], Awaitable[Vectors]], *, is_kept: bool = False
    ) -> dict[str, Vectors]:
        """By key. What is embedded now is kept for later if `is_kept`: a query may never come again."""
        wanted = list(keys)
        vectors = await self._embeddings.get(wanted, self._embedder)
        missing = [key for key in wanted if key not in vectors]
        for start in range(0, len(missing), BATCH):
            some = missing[start : start + BATCH]
            new = dict(zip(some, await embed(some), strict=True))
            if is_kept:
                await self._embeddings.put(new, self._embedder)
            vectors |= new
        return vectors

    def _text_ids(self, text: str, param: str) -> list[int]:
        ids = self._model.tokenizer.encode_plain(text)
        if len(ids) > self._model.max_model_len:
            raise ContextLengthExceeded(
                f"a text of {len(ids)} tokens cannot be compared, the model reads {self._model.max_model_len}",
                param=param,
            )
        return ids


def compared_text(question: str, text: str) -> str:
    """A question says more of what is asked than the answer does."""
    return question or text


def _text(example: Example, strategy: Strategy) -> str:
    text = compared_text(example.question, example.text)
    if not text:
        raise InvalidRequest(
            f"{strategy} compares texts, and the example {example.id!r} has neither question nor text",
            param="examples.strategy",
        )
    return text


def _media(example: Example, strategy: Strategy) -> list[str]:
    if not example.media:
        raise InvalidRequest(
            f"{strategy} compares media, and the example {example.id!r} has none", param="examples.strategy"
        )
    return list(example.media)


def _text_key(ids: list[int]) -> str:
    return "txt_" + hashlib.blake2b(np.array(ids, "<u4").tobytes(), digest_size=32).hexdigest()


def _mean(vectors: dict[str, Vectors]) -> Vectors:
    """[D], of length one: several media of one shot count alike."""
    return _unit(np.mean([*vectors.values()], axis=0, dtype=np.float32))


def _means(own: Sequence[Sequence[str]], vectors: dict[str, Vectors]) -> Vectors:
    return np.stack([_mean({key: vectors[key] for key in keys}) for keys in own])


def _joined(vectors: Iterable[Vectors]) -> Vectors:
    """Side by side, so that the inner product is the mean of theirs."""
    return _unit(np.concatenate([*vectors], axis=-1))


def _unit(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)
