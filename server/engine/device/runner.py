"""Runs a plan on the device: encodes its media into their slots, one forward for all its rows, samples.

It owns the tensors (weights, K/V blocks, media pages) and knows nothing of queues. On a GPU, decode steps are recorded at
start and replayed, and the host need not wait for a step before it launches the next one: no step reads its results, except
for tokens, which stay on the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from kernels.backend import use_triton
from kernels.decode_attention import compile_attention
from kernels.media_attention_gpu import media_tiles
from kernels.paged_plan import TileShape, plan_tiles, static_plan
from model.batch import Batch, KVCache, MediaPages
from model.cpu import DecodeLayer
from model.inference import InferenceModel
from server.engine.caches.media import MediaCache
from server.engine.config import EngineConfig
from server.engine.device.encoder import Encoder
from server.engine.device.graphs import DecodeGraphs, Recorder, bucket_sizes, static_batch
from server.engine.device.runs import runs_of
from server.engine.device.sampler import NOT_FINITE, Reading, Result, Sampler, logit_positions
from server.engine.device.transfers import Downloads, upload
from server.engine.plan import Plan, Row
from server.engine.ranks.messages import NO_FOLLOWERS, Followers


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that the device runs, and its results on their way to the host: of its media and, if it has any, its rows."""

    plan: Plan
    encoded: Downloads
    reading: Reading | None
    nonfinite: set[bytes]  # the keys of the media cache whose encoding was not finite

    @torch.inference_mode()
    def results(self) -> list[Result]:
        """Wait for the device, and return the results of the rows."""
        self.encoded.finish()
        results = [] if self.reading is None else self.reading.results()
        for result in results:
            if not self.nonfinite.isdisjoint(result.row.sequence.media_slots):
                result.error = NOT_FINITE
        return results

    def tokens_of(self, rows: list[Row]) -> Tensor | None:
        """Return the tokens of rows that follow rows of this step, which samples them, on the device."""
        assert self.reading is not None
        token_ids, numbers = self.reading.token_ids, [row.follows for row in rows]
        if numbers == list(range(len(token_ids))):
            return token_ids
        (index,) = upload([torch.tensor(numbers)], token_ids.device)
        return token_ids[index]


class Runner:
    """Runs plans on one model. `record` turns a decode step into one that is replayed; None: no step is recorded.

    Where the model is divided, this is the part of one rank, and `followers` are the others if it is rank 0.
    """

    def __init__(
        self,
        model: InferenceModel,
        config: EngineConfig,
        sampler: Sampler,
        media: MediaCache,
        record: Recorder | None = None,
        followers: Followers = NO_FOLLOWERS,
    ) -> None:
        self.followers = followers
        self.model = model.flamingo
        weight = self.model.language_model.embed.weight
        self.config = config
        self.device, self.dtype = weight.device, weight.dtype
        self._sampler = sampler
        self._nonfinite = media.nonfinite
        self._kv = KVCache.zeros(self.model.config, config.num_blocks, config.block_size, self.dtype, self.device)
        self._media = MediaPages.zeros(self.model.config, config.num_media_slots, self.dtype, self.device)
        self.encoder = Encoder(model, self._media, media, followers)
        self._graphs = None if record is None else self._record(record)

    @property
    def block_bytes(self) -> int:
        return self._kv.blocks[:, 0].nbytes

    @property
    def media_page_bytes(self) -> int:
        return self._media.pages[0].nbytes

    @torch.inference_mode()
    def _record(self, record: Recorder) -> DecodeGraphs:
        config, sizes = self.config, bucket_sizes(self.config.max_sequences)
        width = -(-config.max_model_len // config.block_size)
        has_offsets = self.model.config.language_model.has_key_offsets
        largest = static_batch(sizes[-1], width, config.block_size, has_offsets=has_offsets)
        if use_triton(self._kv.blocks):
            tiles = torch.zeros(sizes[-1], 4, dtype=torch.int32)
            largest = replace(largest, plan=static_plan(sizes[-1], width, self._shape), media_plan=tiles)
        return DecodeGraphs(self._decode, record, sizes, largest, self.device, self._media_tiles)

    def compile_kernels(self) -> None:
        """Compile the loops of attention, and of layers that contain it, on a CPU before a step needs them."""
        text, kv_cache = self.model.config.language_model, self._kv.layer(0)
        layers = [layer for layer in self.model.language_model.layers if isinstance(layer, DecodeLayer)]
        compile_attention(kv_cache, text.num_heads, has_offsets=text.has_key_offsets, is_fused=bool(layers))
        for layer in layers:
            layer.compile_kernels(kv_cache, has_offsets=text.has_key_offsets)

    def _forward(self, batch: Batch) -> Tensor:
        return self.model(batch, self._kv, self._media)

    def _decode(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return logits [S, V], and of each row the most likely token and whether it is finite."""
        logits = self._forward(batch)
        return logits, *self._sampler.greedy(logits, keeps_logits=True)

    @torch.inference_mode()
    def launch(self, plan: Plan, before: Launched | None = None) -> Launched:
        """Begin a step. If its rows follow those of the step `before` it, that one may still run.

        Rows that do not read the pages of this step come first: they do not wait until the host has launched the encoder.
        """
        self.copy_blocks(plan.copies)
        encode = partial(self.encoder.encode, plan.pieces, self.encoder.stream.mark() if plan.pieces else None)
        encoded = encode() if plan.reads_its_pages else None
        token_ids = None if before is None else before.tokens_of(plan.rows)
        reading = self._compute(plan.rows, token_ids) if plan.rows else None
        return Launched(plan, encode() if encoded is None else encoded, reading, self._nonfinite)

    def _compute(self, rows: list[Row], token_ids: Tensor | None) -> Reading:
        """Begin one forward for all rows and the reading of its logits; `token_ids` on the device replace unknown ones."""
        positions = [logit_positions(row) for row in rows]
        batch = self._batch(rows, positions)
        self.followers.forward(batch)
        self.encoder.await_pages(batch.media_slot)
        batch = self._planned(batch)
        if self._graphs is not None and _only_decodes(batch) and self._graphs.takes(batch):
            logits, *greedy = self._graphs.run(batch, token_ids)
        else:
            logits, greedy = self._forward(self._uploaded(batch, token_ids)), []
        if self._mark_spans(rows, positions, logits):
            greedy = []  # they were of the logits before
        return self._sampler.read(rows, positions, logits, greedy)

    def _uploaded(self, batch: Batch, token_ids: Tensor | None = None) -> Batch:
        if self.device.type != "cpu":
            batch = batch.with_tensors(upload(batch.tensors, self.device))
        return batch if token_ids is None else replace(batch, token_ids=token_ids)

    def _mark_spans(self, rows: list[Row], positions: list[range], logits: Tensor) -> bool:
        """Set the logits of rows whose keys or values are not finite to NaN; return whether logits may have changed.

        Only rows that end before the query are checked: their logits are those of the last shot, and do not depend on the
        others. A token that is not finite in any layer has keys and values that are not finite in the last one.
        """
        suspects = [i for i, row in enumerate(rows) if _ends_before_query(row)]
        if not suspects:
            return False
        size, ends = self.config.block_size, list(accumulate(map(len, positions)))
        slots = [torch.tensor([slot for run in runs_of([rows[i]]) for slot in run.slots(size)]) for i in suspects]
        last = self._kv.layer(self.model.config.language_model.num_layers - 1)
        for i, stored in zip(suspects, upload(slots, self.device), strict=True):
            is_finite = last[stored // size, :, :, stored % size].isfinite().all()
            logits[ends[i] - 1].masked_fill_(~is_finite, torch.nan)
        return True

    def forward(self, batch: Batch) -> None:
        """Compute a rank's part of a batch in host memory: keys and values, and the terms of all sums."""
        self._forward(self._uploaded(self._planned(batch)))

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        if copies:
            self.followers.copy_blocks(copies)
            (blocks,) = upload([torch.tensor(copies).T.contiguous()], self.device)
            self._kv.blocks[:, blocks[1]] = self._kv.blocks[:, blocks[0]]

    def _batch(self, rows: list[Row], positions: list[range]) -> Batch:
        # lists: most steps have a handful of rows, for which the operators of arrays are slower
        size, runs = self.config.block_size, list(runs_of(rows))
        has_spans = any(row.sequence.layout is not None for row in rows)
        if may_have_offsets := self.model.config.language_model.has_key_offsets:
            # on a GPU the sums of a row would differ between steps with offsets and steps without
            has_spans = has_spans or use_triton(self._kv.blocks)
        has_offsets = has_spans and may_have_offsets
        starts = list(accumulate((row.end - row.start for row in rows), initial=0))
        return Batch(
            token_ids=_table([token_id for row in rows for token_id in row.token_ids], np.int64),
            positions=_table([position for run in runs for position in run.positions], np.int64),
            media_slot=self._slots(rows),
            query_starts=_table(list(accumulate((run.count for run in runs), initial=0)), np.int32),
            last_token=_table(
                [
                    start + position - row.start
                    for row, start, logit_span in zip(rows, starts, positions, strict=False)
                    for position in logit_span
                ],
                np.int64,
            ),
            context_lengths=_table([run.num_slots(size) for run in runs], np.int32),
            block_table=_table(_padded([run.table for run in runs]), np.int32),
            block_positions=_table(_padded([r.block_positions(size) for r in runs]), np.int32) if has_spans else None,
            block_lengths=_table(_padded([r.block_lengths(size) for r in runs]), np.int32) if has_spans else None,
            block_offsets=_table(_padded([r.block_offsets() for r in runs]), np.int32) if has_offsets else None,
            slot_mapping=_table([slot for run in runs for slot in run.slots(size)], np.int64),
        )

    def _planned(self, batch: Batch) -> Batch:
        """Add the plans of a GPU's attentions. Made on the host, they have no empty tiles, and the host need not wait."""
        if not use_triton(self._kv.blocks):
            return batch
        assert batch.block_table is not None
        assert batch.context_lengths is not None
        plan = plan_tiles(
            batch.block_table, batch.query_starts, batch.context_lengths,
            num_tokens=len(batch.token_ids), shape=self._shape, spans=self.model.language_model.spans(batch),
        )  # fmt: skip
        media_plan = None if batch.media_slot is None else self._media_tiles(batch.media_slot)
        return replace(batch, plan=plan, media_plan=media_plan)

    @property
    def _shape(self) -> TileShape:
        text = self.model.config.language_model
        group = text.num_heads // text.num_kv_heads
        return TileShape(self.config.block_size, group, text.head_dim, self.dtype, text.has_key_offsets)

    def _media_tiles(self, slots: Tensor) -> Tensor:
        return media_tiles(slots, self.model.config.gated.head_dim, self.dtype)

    def _slots(self, rows: list[Row]) -> Tensor | None:
        if not any(row.sequence.media_slots for row in rows):
            return None
        if self.model.config.gated.attends == "all_previous":
            return _table(_all_previous_slots(rows), np.int32)
        slots = [
            -1 if media < 0 else row.sequence.media_slots[row.sequence.keys[media]]
            for row in rows
            for media in row.media_index
        ]
        return _table(slots, np.int32)


def _ends_before_query(row: Row) -> bool:
    layout = row.sequence.layout
    return layout is not None and row.end <= layout.query_start


def _only_decodes(batch: Batch) -> bool:
    """Return whether every token is a run of its own, and its logits are read."""
    return len(batch.token_ids) == len(batch.query_starts) - 1 == len(batch.last_token)


def _table(values: object, dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=dtype))


def _padded(rows: list[list[int]]) -> list[list[int]]:
    width = max(map(len, rows))
    return [row + [0] * (width - len(row)) for row in rows]


def _all_previous_slots(rows: list[Row]) -> list[list[int]]:
    """Return the slots of the ablation that reads all media so far: one row per token, padded with -1."""
    per_token = [
        [row.sequence.media_slots[row.sequence.keys[m]] for m in range(media + 1)]
        for row in rows
        for media in row.media_index
    ]
    width = max(1, *map(len, per_token))
    return [slots + [-1] * (width - len(slots)) for slots in per_token]
