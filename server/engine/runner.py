"""Runs a plan on the device: encodes its media into their slots, one forward for all its rows, samples.

It owns the tensors (weights, K/V blocks, media pages) and knows nothing of queues. On a GPU, decode steps are recorded at
start and replayed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.backend import use_triton
from kernels.media_attention_gpu import media_tiles
from kernels.paged_plan import Shape, static_plan
from model.batch import Batch, KVCache, MediaPages
from model.inference import InferenceModel
from model.vision import normalise
from server.engine.caches import Encoding, MediaCache, Piece
from server.engine.config import EngineConfig
from server.engine.graphs import DecodeGraphs, Recorder, bucket_sizes, static_batch
from server.engine.plan import Plan, Row
from server.engine.runs import runs_of
from server.engine.sampler import NOT_FINITE, Result, Sampler, logit_positions

# pages from visual tokens in host memory that are computed at once: they take memory in addition to the slots
REBUILT_TOGETHER = 8


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

    @property
    def block_bytes(self) -> int:
        return self._kv.blocks[:, 0].nbytes

    @property
    def media_page_bytes(self) -> int:
        return self._media.pages[0].nbytes

    @torch.inference_mode()
    def _record(self, record: Recorder) -> DecodeGraphs:
        config, text, kv = self.config, self.model.config.language_model, self._kv.layer(0)
        sizes, width = bucket_sizes(config.max_sequences), -(-config.max_model_len // config.block_size)
        largest = static_batch(sizes[-1], width, config.block_size, self.device)
        if use_triton(kv):
            shape = Shape(config.block_size, text.num_heads // text.num_kv_heads, text.head_dim, kv.dtype)
            largest = replace(largest, plan=static_plan(sizes[-1], width, shape, self.device))
        return DecodeGraphs(self._forward, record, sizes, largest)

    def _forward(self, batch: Batch) -> Tensor:
        return self.model(batch, self._kv, self._media)

    @torch.inference_mode()
    def run(self, plan: Plan) -> list[Result]:
        self._copy_blocks(plan.copies)
        self.encoder.run(plan.pieces)
        if not plan.rows:
            return []
        positions = [logit_positions(row) for row in plan.rows]
        batch = self._batch(plan.rows, positions)
        is_decode = all(row.count == len(span) == 1 for row, span in zip(plan.rows, positions, strict=True))
        is_recorded = self._graphs is not None and is_decode and self._graphs.takes(batch)
        step = self._graphs.run if self._graphs is not None and is_recorded else self._forward
        results = self._sampler.read(plan.rows, positions, step(batch))
        for result in results:
            if not (self._nonfinite.isdisjoint(result.row.sequence.media_slots) and self._has_finite_spans(result.row)):
                result.error = NOT_FINITE
        return results

    def _has_finite_spans(self, row: Row) -> bool:
        """Return whether the keys and values are finite of a piece that ends before the query.

        Its logits are those of the last shot, and do not depend on the others. A token that is not finite in any layer has
        keys and values that are not finite in the last one.
        """
        layout, size = row.sequence.layout, self.config.block_size
        if layout is None or row.start + row.count > layout.query_start:
            return True
        slots = torch.tensor([slot for run in runs_of([row]) for slot in run.slots(size)], device=self.device)
        last = self._kv.layer(self.model.config.language_model.num_layers - 1)
        return bool(last[slots // size, :, :, slots % size].isfinite().all())

    def _copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        if copies:
            sources, targets = torch.tensor(copies, device=self.device).T
            self._kv.blocks[:, targets] = self._kv.blocks[:, sources]

    def _batch(self, rows: list[Row], positions: list[range]) -> Batch:
        # lists: most steps have a handful of rows, for which the operators of arrays are slower
        size, runs = self.config.block_size, list(runs_of(rows))
        has_spans = any(row.sequence.layout is not None for row in rows)
        starts = list(accumulate((row.count for row in rows), initial=0))
        batch = Batch(
            token_ids=_table([t for r in rows for t in r.sequence.token_ids[r.start : r.start + r.count]], np.int64),
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
            slot_mapping=_table([slot for run in runs for slot in run.slots(size)], np.int64),
        )
        return self._upload(batch)

    def _upload(self, batch: Batch) -> Batch:
        """Return a batch of host memory, with the plans of a GPU's attentions, on the device."""
        if use_triton(self._kv.blocks):
            slots, head_dim = batch.media_slot, self.model.config.gated.head_dim
            media_plan = None if slots is None else media_tiles(slots, head_dim, self.dtype)
            plan = self.model.language_model.plan(batch, self._kv.layer(0))
            batch = replace(batch, plan=plan, media_plan=media_plan)
        if self.device.type == "cpu":
            return batch
        tables = {field.name: getattr(batch, field.name) for field in fields(batch)}
        moved: dict[str, Any] = {
            name: table.pin_memory().to(self.device, non_blocking=True)
            for name, table in tables.items()
            if isinstance(table, Tensor)
        }
        return replace(batch, **moved)

    def _slots(self, rows: list[Row]) -> Tensor | None:
        if not any(row.sequence.media_slots for row in rows):
            return None
        if self.model.config.gated.attends == "all_previous":
            return _table(_all_previous_slots(rows), np.int32)
        slots = [
            -1 if media < 0 else row.sequence.media_slots[row.sequence.keys[media]]
            for row in rows
            for media in row.sequence.media_index[row.start : row.start + row.count]
        ]
        return _table(slots, np.int32)


class Encoder:
    """Encodes media: frames through vision encoder and resampler into pages, visual tokens and pooled features.

    `pages` are the device's slots, and `media` records what is cached. All frames of a step are one batch of the vision
    encoder, and media of one length one of the resampler. Visual tokens from host memory need only their keys and values.
    Output that is not finite is not cached, and its key is noted.
    """

    def __init__(self, model: InferenceModel, pages: MediaPages, media: MediaCache) -> None:
        self._model = model.flamingo
        self._project = model.project_media
        self._pages = pages.pages
        self._media = media
        self._pixel_dtype = next(self._model.vision.parameters()).dtype

    def run(self, pieces: Sequence[Piece]) -> None:
        pieces = _last_of_each_slot(pieces)
        kept = [(p.encoding, p.encoding.visual_tokens) for p in pieces if p.encoding.visual_tokens is not None]
        for first in range(0, len(kept), REBUILT_TOGETHER):
            group = kept[first : first + REBUILT_TOGETHER]
            visual_tokens = torch.stack([tokens for _, tokens in group])
            self._fill([encoding for encoding, _ in group], visual_tokens.to(self._pages.device, self._pages.dtype))
        by_length: dict[int, list[tuple[Encoding, Tensor]]] = defaultdict(list)
        for encoding, features in self._encode([piece for piece in pieces if piece.count]):
            by_length[len(features)].append((encoding, features))
        for same_length in by_length.values():
            self._resample([encoding for encoding, _ in same_length], torch.stack([f for _, f in same_length]))

    def _encode(self, pieces: list[Piece]) -> Iterator[tuple[Encoding, Tensor]]:
        """Encode the frames of these pieces; yield the features [F, P, Dv] of media that are complete, keep the others."""
        clips = [piece.frames for piece in pieces if piece.frames is not None]
        if not clips:
            return
        parts = self.features(clips).split([piece.count for piece in pieces])
        for piece, features in zip(pieces, parts, strict=True):
            encoding = piece.encoding
            if piece.is_last:
                yield encoding, torch.cat([*(kept.to(features.device) for kept in encoding.features), features])
            else:
                # a copy: a view would keep the features of the whole step
                encoding.features.append(features.to("cpu", copy=True))

    def _resample(self, encodings: list[Encoding], features: Tensor) -> None:
        visual_tokens = self._model.resampler(features).to(self._pages.dtype)
        self._fill(encodings, visual_tokens)
        self._keep([encoding.key for encoding in encodings], visual_tokens.cpu(), pool(features))

    def _keep(self, keys: list[bytes], visual_tokens: Tensor, pooled: NDArray[np.float32]) -> None:
        for key, tokens, vector in zip(keys, visual_tokens, pooled, strict=True):
            if tokens.isfinite().all() and np.isfinite(vector).all():
                self._media.host.put(key, tokens.clone())
                self._media.pooled.put(key, vector.copy())
            else:
                self._media.nonfinite.add(key)

    def features(self, clips: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Frames [f, h, w, 3] of any number of media, F in all -> [F, P, Dv]."""
        frames = torch.from_numpy(np.concatenate(clips)).to(self._pages.device)
        pixels = normalise(frames, self._model.config.vision).to(self._pixel_dtype)
        return self._model.features(pixels[:, None])[:, 0]

    def _fill(self, encodings: list[Encoding], visual_tokens: Tensor) -> None:
        indices = [i for i, encoding in enumerate(encodings) if encoding.slot is not None]
        if indices:
            slots = torch.tensor([encodings[i].slot for i in indices], device=self._pages.device)
            self._pages[slots] = self._project(visual_tokens[indices])


def pool(features: Tensor) -> NDArray[np.float32]:
    """Features [M, F, P, Dv] -> [M, Dv]: their mean over frames and patches."""
    return features.float().mean((1, 2)).cpu().numpy()


def unit(vectors: Tensor) -> NDArray[np.float32]:
    """Scale vectors [N, D] to length one; a vector of zeros stays zero."""
    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()


def _last_of_each_slot(pieces: Sequence[Piece]) -> list[Piece]:
    """Drop encodings into slots that were reassigned within one plan: the last one owns the slot."""
    owner = {piece.encoding.slot: piece.encoding for piece in pieces}
    return [p for p in pieces if p.encoding.slot is None or owner[p.encoding.slot] is p.encoding]


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
        for media in row.sequence.media_index[row.start : row.start + row.count]
    ]
    width = max(1, *map(len, per_token))
    return [slots + [-1] * (width - len(slots)) for slots in per_token]
