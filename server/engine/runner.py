"""Runs a plan on the device: encodes its media into their slots, one forward for all its rows, samples.

It owns the tensors (weights, K/V blocks, media pages) and knows nothing of queues.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from model.batch import Batch
from model.cache import KVCache, MediaCache
from model.flamingo import Flamingo
from model.vision import normalise
from server.engine.config import EngineConfig
from server.engine.graphs import DecodeGraphs, Recorder, bucket_sizes
from server.engine.media_cache import Encoding, HostTier
from server.engine.sampler import Sampler, token_logprobs
from server.engine.scheduler import Plan, Row
from server.engine.wire import TokenLogprob


@dataclass(slots=True)
class Result:
    """What a row of the plan gave: nothing but K/V, or prompt log-probabilities, or a token; or `failed`."""

    row: Row
    token_id: int | None = None
    logprob: TokenLogprob | None = None
    # for tokens start + 1 .. of the prompt, in order
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    # of a beam, instead of a token
    candidates: list[tuple[int, float]] = field(default_factory=list)
    failed: str = ""


class Runner:
    """`record` turns a decode step into one that is replayed; None: every step is run as it comes."""

    def __init__(
        self, model: Flamingo, config: EngineConfig, sampler: Sampler, host: HostTier, record: Recorder | None = None
    ) -> None:
        weight = model.language_model.embed.weight
        self.model = model
        self.config = config
        self.device, self.dtype = weight.device, weight.dtype
        self._pixel_dtype = next(model.vision.parameters()).dtype
        self._sampler = sampler
        self._host = host
        self._kv = KVCache.zeros(model.config, config.num_blocks, config.block_size, self.dtype, self.device)
        self._media = MediaCache.zeros(model.config, config.num_media_slots, self.dtype, self.device)
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
        self._encode(plan.encodings)
        if not plan.rows:
            return []
        wanted = [_wanted_tokens(row) for row in plan.rows]
        batch = self._batch(plan.rows, wanted)
        step = self._graphs.run if self._graphs is not None and _is_decode(plan.rows, wanted) else self._forward
        return self._results(plan.rows, wanted, step(batch).float())

    def _copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        if copies:
            sources, targets = torch.tensor(copies, device=self.device).T
            self._kv.blocks[:, targets] = self._kv.blocks[:, sources]

    # media

    def _encode(self, encodings: list[Encoding]) -> None:
        # a slot given up and given away again within one plan belongs to the last
        by_slot = {encoding.slot: encoding for encoding in encodings}.values()
        by_length: dict[int, list[Encoding]] = defaultdict(list)
        for encoding in by_slot:
            if encoding.visual_tokens is not None:
                self._fill([encoding], encoding.visual_tokens[None].to(self.device, self.dtype))
            elif encoding.frames is not None:
                by_length[len(encoding.frames)].append(encoding)
        for same_length in by_length.values():
            visual_tokens = self.model.encode_media(self._pixels(same_length)).to(self.dtype)
            self._fill(same_length, visual_tokens)
            for encoding, tokens in zip(same_length, visual_tokens.cpu(), strict=True):
                self._host.put(encoding.key, tokens.clone())

    def _pixels(self, encodings: list[Encoding]) -> Tensor:  # [M, F, 3, h, w]
        frames = torch.from_numpy(np.stack([e.frames for e in encodings if e.frames is not None])).to(self.device)
        pixels = normalise(frames.flatten(0, 1), self.model.config.vision).to(self._pixel_dtype)
        return pixels.unflatten(0, frames.shape[:2])

    def _fill(self, encodings: list[Encoding], visual_tokens: Tensor) -> None:
        slots = torch.tensor([encoding.slot for encoding in encodings], device=self.device)
        self._media.pages[slots] = self.model.media_kv(visual_tokens).to(self.dtype)

    # text

    def _batch(self, rows: list[Row], wanted: list[range]) -> Batch:
        counts = np.array([row.count for row in rows])
        starts = np.concatenate([[0], counts.cumsum()])
        tables = [row.sequence.block_table for row in rows]
        block_table = np.zeros((len(rows), max(map(len, tables))), np.int32)
        for i, table in enumerate(tables):
            block_table[i, : len(table)] = table
        num_shared = _shared_blocks(block_table, min(row.start for row in rows) // self.config.block_size)
        positions = np.concatenate([np.arange(row.start, row.start + row.count) for row in rows])
        owner = np.repeat(np.arange(len(rows)), counts)
        blocks = block_table[owner, positions // self.config.block_size]
        return Batch(
            token_ids=self._put([t for r in rows for t in r.sequence.token_ids[r.start : r.start + r.count]], np.int64),
            positions=self._put(positions, np.int64),
            media_slot=self._slots(rows),
            query_starts=self._put(starts, np.int32),
            last_token=self._put(
                [starts[i] + t - row.start for i, row in enumerate(rows) for t in wanted[i]], np.int64
            ),
            num_shared_blocks=num_shared,
            context_lengths=self._put([row.start + row.count for row in rows], np.int32),
            block_table=self._put(block_table, np.int32),
            slot_mapping=self._put(
                blocks.astype(np.int64) * self.config.block_size + positions % self.config.block_size, np.int64
            ),
        )

    def _put(self, values: object, dtype: type[np.generic]) -> Tensor:
        tensor = torch.from_numpy(np.asarray(values, dtype=dtype))
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _slots(self, rows: list[Row]) -> Tensor | None:
        if not any(row.sequence.held for row in rows):
            return None
        if self.model.config.gated.attends == "all_previous":
            return self._put(_all_previous_slots(rows), np.int32)
        slots = [
            -1 if media < 0 else row.sequence.held[row.sequence.keys[media]]
            for row in rows
            for media in row.sequence.media_index[row.start : row.start + row.count]
        ]
        return self._put(slots, np.int32)

    # results

    def _results(self, rows: list[Row], wanted: list[range], logits: Tensor) -> list[Result]:
        results = [Result(row) for row in rows]
        parts = logits.split([len(w) for w in wanted])
        # a row's maximum is NaN where any of its logits is
        is_finite = logits.amax(-1).isfinite()
        sampling = [i for i, row in enumerate(rows) if row.samples]
        chosen = self._choose([results[i] for i in sampling], [parts[i][-1] for i in sampling])
        for result, good in zip(results, is_finite.split([len(w) for w in wanted]), strict=True):
            if not bool(good.all()):
                result.failed = "the model's output is not finite"
        for i, token_id in zip(sampling, chosen.tolist(), strict=True):
            results[i].token_id = token_id
        self._report(results, wanted, parts)
        return results

    def _choose(self, results: list[Result], logits: list[Tensor]) -> Tensor:
        """Sample, for the rows that do; the ids are still on the device. Beams get candidates instead."""
        sequences = [result.row.sequence for result in results]
        for result, sequence, row in zip(results, sequences, logits, strict=True):
            if width := sequence.sampling.beam_width:
                result.candidates = self._sampler.candidates(row.log_softmax(-1), 2 * width)
        return self._sampler.sample(torch.stack(logits), sequences) if logits else torch.empty(0)

    def _report(self, results: list[Result], wanted: list[range], parts: Sequence[Tensor]) -> None:
        """Log-probabilities, of prompts and of sampled tokens, for those who asked."""
        for result, tokens, part in zip(results, wanted, parts, strict=True):
            if result.failed:
                continue
            sampling = result.row.sequence.sampling
            if sampling.prompt_logprobs is not None:
                result.prompt_logprobs = _prompt_logprobs(result.row, tokens, part)
            if sampling.logprobs is not None and result.token_id is not None:
                row = part[-1:].log_softmax(-1)
                (result.logprob,) = token_logprobs(row, [result.token_id], [sampling.logprobs])


def _is_decode(rows: list[Row], wanted: list[range]) -> bool:
    """Whether each row is one token whose logits are wanted."""
    return all(row.count == 1 and len(tokens) == 1 for row, tokens in zip(rows, wanted, strict=True))


def _shared_blocks(block_table: np.ndarray, most: int) -> int:
    """Blocks in front that are the same in every row, none of which a row of this step writes to."""
    if len(block_table) < 2:
        return 0
    same = (block_table[:, :most] == block_table[:1, :most]).all(0)
    return int(same.cumprod().sum())


def _wanted_tokens(row: Row) -> range:
    """The tokens whose logits are wanted: the last one to sample from, and all of a prompt that is scored."""
    end = row.start + row.count
    if row.sequence.wants_prompt_logprobs:
        last_scored = row.sequence.num_prompt_tokens - 1
        return range(row.start, end) if row.start < last_scored or row.samples else range(end, end)
    return range(end - 1, end) if row.samples else range(end, end)


def _prompt_logprobs(row: Row, tokens: range, logits: Tensor) -> list[TokenLogprob]:
    """Of the prompt tokens that follow `tokens`; the last prompt token is followed by none."""
    sequence = row.sequence
    following = [sequence.token_ids[t + 1] for t in tokens if t + 1 < sequence.num_prompt_tokens]
    num_top = [sequence.sampling.prompt_logprobs or 0] * len(following)
    return token_logprobs(logits[: len(following)].log_softmax(-1), following, num_top)


def _all_previous_slots(rows: list[Row]) -> list[list[int]]:
    """The ablation that reads every media so far: a row of slots a token, padded with -1."""
    per_token = [
        [row.sequence.held[row.sequence.keys[m]] for m in range(media + 1)]
        for row in rows
        for media in row.sequence.media_index[row.start : row.start + row.count]
    ]
    width = max(1, *map(len, per_token))
    return [slots + [-1] * (width - len(slots)) for slots in per_token]
