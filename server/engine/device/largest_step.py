"""The largest step and the largest decode step of an engine's limits, to measure the memory that they take.

They run on an engine's own runner, with caches of two blocks and of one slot per frame. Rows that follow each other have
different blocks, as in service: torch's operators would gather a block once that all rows have in the same place.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from model.inference import InferenceModel
from model.prompt import EncodedPrompt, PromptTokenizer
from server.engine.caches.media import Encoding, MediaCache
from server.engine.config import EngineConfig
from server.engine.device.memory import DeviceMemory, Room
from server.engine.device.runner import Runner
from server.engine.device.sampler import Sampler
from server.engine.plan import Plan, Row
from server.engine.sequence import QueueOrder, Sequence
from server.wire import Sampling

KEY = b"image"
NUM_BLOCKS = 2
# everything that takes memory: sorted probabilities, and the log-probabilities of every token
SAMPLING = Sampling(max_tokens=1, top_p=0.9, logprobs=20, prompt_logprobs=20, seed=0)


class LargestStep:
    """A runner with these limits, whose steps are as large as any."""

    def __init__(self, model: InferenceModel, tokenizer: PromptTokenizer, config: EngineConfig) -> None:
        self._config = config
        small = replace(config, num_blocks=NUM_BLOCKS, num_media_slots=config.max_frames_idle, max_model_len=1)
        self._image_size = model.flamingo.config.vision.image_size
        sampler = Sampler(tokenizer.suppressed_ids, tokenizer.eos_ids)
        self._runner = Runner(model, small, sampler, MediaCache(config.max_frames_idle, 0, b""))

    def run(self) -> None:
        """Encode as many frames as any step, and compute the logits of as many tokens, of as many sequences."""
        num_tokens, num_rows = self._config.max_tokens_per_step, self._num_rows
        counts = [num_tokens // num_rows + (row < num_tokens % num_rows) for row in range(num_rows)]
        plan = self._plan(counts, SAMPLING)
        pixels = np.zeros((1, self._image_size, self._image_size, 3), np.uint8)
        encodings = [Encoding(bytes([0, slot]), pixels, slot=slot) for slot in range(self._config.max_frames_idle)]
        plan.pieces = [encoding.next_piece(1) for encoding in encodings]
        self._runner.launch(plan).results()

    def decode(self) -> None:
        """Compute one greedy token of as many sequences as may run."""
        self._runner.launch(self._plan([1] * self._num_rows, Sampling(max_tokens=1, temperature=0.0))).results()

    @property
    def _num_rows(self) -> int:
        return min(self._config.max_sequences, self._config.max_tokens_per_step)

    def _plan(self, counts: list[int], sampling: Sampling) -> Plan:
        plan = Plan(step=1, tokens_left=0, max_frames=0, max_frames_idle=0)
        plan.rows = [self._row(i, count, sampling) for i, count in enumerate(counts)]
        return plan

    def _row(self, number: int, count: int, sampling: Sampling) -> Row:
        """Return the last tokens of the longest sequence."""
        length = max(self._config.max_model_len, count)
        prompt = EncodedPrompt(token_ids=[0] * length, media_index=[0] * length, media=[KEY])
        sequence = Sequence(f"{number}", prompt, sampling, QueueOrder())
        sequence.keys, sequence.media_slots = [KEY], {KEY: 0}
        sequence.block_table = [number % NUM_BLOCKS] * -(-length // self._config.block_size)
        return Row(sequence, length - count, count, samples=True)


def measure(
    memory: DeviceMemory,
    fraction: float,
    model: InferenceModel,
    tokenizer: PromptTokenizer,
    config: EngineConfig,
    *,
    is_recorded: bool,
) -> Room:
    """Return what is left of a device's memory next to the weights, the largest step and recorded steps."""
    used = memory.used()
    largest = LargestStep(model, tokenizer, config)
    step = memory.peak_of(largest.run)
    graphs = memory.peak_of(largest.decode) if is_recorded else 0
    return Room(total=memory.total(), fraction=fraction, used=used, step=step, graphs=graphs)
