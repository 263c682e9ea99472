"""The peer: llama.cpp through the low-level calls of its Python binding, with several sequences in one batch.

It reads the file of quantised weights that our default model was converted from.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from bench.driver import BenchFailed, Outcome, Trace


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: Any) -> None:
    """Discard a log message: the loader prints a page."""


class LlamaCpp:
    """A llama.cpp context for `num_sequences` sequences of `length` tokens.

    Both thread counts are set, because llama.cpp has a separate one for prompts.
    """

    def __init__(self, file: Path, *, num_threads: int, num_sequences: int, length: int) -> None:
        llama_cpp.llama_log_set(_silent, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise BenchFailed(f"llama.cpp cannot load {file}")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = num_sequences * length
        parameters.n_batch = parameters.n_ubatch = num_sequences * length
        parameters.n_seq_max = num_sequences
        parameters.n_threads = parameters.n_threads_batch = num_threads
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        self._batch = llama_cpp.llama_batch_init(num_sequences * length, 0, 1)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Outcome:
        """Generate greedy tokens: all prompts as one batch, then one token per sequence and step."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        began = time.perf_counter()
        traces = tuple(Trace(began) for _ in prompts)
        self._decode(prompts, [0] * len(prompts), traces)
        for step in range(max_tokens - 1):
            starts = [len(prompt) + step for prompt in prompts]
            self._decode([trace.token_ids[-1:] for trace in traces], starts, traces)
        return Outcome(traces, time.perf_counter() - began)

    def _decode(self, parts: Sequence[Sequence[int]], starts: Sequence[int], traces: Sequence[Trace]) -> None:
        """Decode the new tokens of all sequences in one call, and append each greedy next token to its trace."""
        last_positions = self._fill(parts, starts)
        if status := llama_cpp.llama_decode(self._context, self._batch):
            raise BenchFailed(f"llama_decode returned {status}")
        for trace, position in zip(traces, last_positions, strict=True):
            logits = llama_cpp.llama_get_logits_ith(self._context, position)
            trace.token_ids.append(int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax()))
        now = time.perf_counter()
        for trace in traces:
            trace.times.append(now)

    def _fill(self, parts: Sequence[Sequence[int]], starts: Sequence[int]) -> list[int]:
        """Fill the batch, and return the position of each sequence's last token, whose logits are requested."""
        batch, position, last_positions = self._batch, 0, []
        for sequence, (part, start) in enumerate(zip(parts, starts, strict=True)):
            for offset, token_id in enumerate(part):
                batch.token[position] = token_id
                batch.pos[position] = start + offset
                batch.n_seq_id[position] = 1
                batch.seq_id[position][0] = sequence
                batch.logits[position] = offset == len(part) - 1
                position += 1
            last_positions.append(position - 1)
        batch.n_tokens = position
        return last_positions
