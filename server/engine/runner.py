"""Runs a plan on the device: encodes its media into their slots, one forward for all its rows, samples.

It owns the tensors (weights, K/V blocks, media pages) and knows nothing of queues.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, takewhile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.batch import Batch, KVCache, MediaPages, whole_sequences
from model.inference import InferenceModel
from server.engine.config import EngineConfig
from server.engine.encoder import Encoder, unit
from server.engine.graphs import DecodeGraphs, Recorder, bucket_sizes
from server.engine.media_cache import MediaCache
from server.engine.plan import Plan, Row
from server.engine.sampler import NOT_FINITE, Result, Sampler, logit_positions


class Runner:
    """Runs plans on one model. `record` turns a decode step into one that is replayed; None: no step is recorded."""

    def __init__(
        self,
        model: InferenceModel,
        config: EngineConfig,
        sampler: Sampler,
        media: MediaCache,
        record: Recorder | None = None,
    ) -> None:
        self.model = model.flamingo
        weight = self.model.language_model.embed.weight
        self.config = config
        self.device, self.dtype = weight.device, weight.dtype
        self._sampler = sampler
        self._nonfinite = media.nonfinite
        self._kv = KVCache.zeros(self.model.config, config.num_blocks, config.block_size, self.dtype, self.device)
        self._media = MediaPages.zeros(self.model.config, config.num_media_slots, self.dtype, self.device)
        self.encoder = Encoder(model, self._media, media)
        self._graphs = None if record is None else self._record(record)

    @torch.inference_mode()
    def _record(self, record: Recorder) -> DecodeGraphs:
        width = -(-self.config.max_model_len // self.config.block_size)
        return DecodeGraphs(self._forward, record, bucket_sizes(self.config.max_sequences), width, self.device)

    def _forward(self, batch: Batch) -> Tensor:
        return self.model(batch, self._kv, self._media)

    @torch.inference_mode()
    def run(self, plan: Plan) -> list[Result]:
        self._copy_blocks(plan.copies)
        self.encoder.run(plan.encodings)
        if not plan.rows:
            return []
        positions = [logit_positions(row) for row in plan.rows]
        batch = self._batch(plan.rows, positions)
        step = self._graphs.run if self._graphs is not None and self._is_decode(plan.rows, positions) else self._forward
        results = self._sampler.read(plan.rows, positions, step(batch))
        for result in results:
            if not self._nonfinite.isdisjoint(result.row.sequence.media_slots):
                result.error = NOT_FINITE
        return results

    def _is_decode(self, rows: list[Row], positions: list[range]) -> bool:
        """Return whether the step was recorded: at most `max_sequences` rows, each of one token. Beams can be more."""
        return len(rows) <= self.config.max_sequences and all(
            row.count == len(span) == 1 for row, span in zip(rows, positions, strict=True)
        )

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[list[int]]) -> NDArray[np.float32]:
        """Return the language model's last hidden states without media, mean over tokens, of length one.

        Token ids of N texts -> [N, D]. Values are not finite if the model's output is not.
        """
        batch = whole_sequences(list(texts), [[-1] * len(ids) for ids in texts], self.device)
        hidden = self.model.language_model.hidden_states(batch).float()
        return unit(torch.stack([part.mean(0) for part in hidden.split([len(ids) for ids in texts])]))

    def _copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        if copies:
            sources, targets = torch.tensor(copies, device=self.device).T
            self._kv.blocks[:, targets] = self._kv.blocks[:, sources]

    def _batch(self, rows: list[Row], positions: list[range]) -> Batch:
        # lists: most steps have a handful of rows, for which the operators of arrays are slower
        size, tables = self.config.block_size, [row.sequence.block_table for row in rows]
        spans = [range(row.start, row.start + row.count) for row in rows]
        starts = list(accumulate((row.count for row in rows), initial=0))
        width = max(map(len, tables))
        return Batch(
            token_ids=self._put([t for r in rows for t in r.sequence.token_ids[r.start : r.start + r.count]], np.int64),
            positions=self._put([position for span in spans for position in span], np.int64),
            media_slot=self._slots(rows),
            query_starts=self._put(starts, np.int32),
            last_token=self._put(
                [
                    start + position - row.start
                    for row, start, logit_span in zip(rows, starts, positions, strict=False)
                    for position in logit_span
                ],
                np.int64,
            ),
            num_shared_blocks=_num_shared_blocks(tables, min(row.start for row in rows) // size),
            context_lengths=self._put([span.stop for span in spans], np.int32),
            block_table=self._put([table + [0] * (width - len(table)) for table in tables], np.int32),
            slot_mapping=self._put(
                [
                    table[at // size] * size + at % size
                    for table, span in zip(tables, spans, strict=True)
                    for at in span
                ],
                np.int64,
            ),
        )

    def _put(self, values: object, dtype: type[np.generic]) -> Tensor:
        tensor = torch.from_numpy(np.asarray(values, dtype=dtype))
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _slots(self, rows: list[Row]) -> Tensor | None:
        if not any(row.sequence.media_slots for row in rows):
            return None
        if self.model.config.gated.attends == "all_previous":
            return self._put(_all_previous_slots(rows), np.int32)
        slots = [
            -1 if media < 0 else row.sequence.media_slots[row.sequence.keys[media]]
            for row in rows
            for media in row.sequence.media_index[row.start : row.start + row.count]
        ]
        return self._put(slots, np.int32)


def _num_shared_blocks(tables: list[list[int]], max_blocks: int) -> int:
    """Return how many leading blocks all rows share, of the `max_blocks` that no row of this step writes to."""
    if len(tables) < 2:
        return 0
    columns = zip(*(table[:max_blocks] for table in tables), strict=False)
    return sum(1 for _ in takewhile(lambda column: column.count(column[0]) == len(column), columns))


def _all_previous_slots(rows: list[Row]) -> list[list[int]]:
    """Return the slots of the ablation that reads all media so far: one row per token, padded with -1."""
    per_token = [
        [row.sequence.media_slots[row.sequence.keys[m]] for m in range(media + 1)]
        for row in rows
        for media in row.sequence.media_index[row.start : row.start + row.count]
    ]
    width = max(1, *map(len, per_token))
    return [slots + [-1] * (width - len(slots)) for slots in per_token]
