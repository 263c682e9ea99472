"""A sequence: its tokens so far, which media each reads, and the blocks and slots that it holds of the caches."""

from __future__ import annotations

import random
import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from model.prompt import EncodedPrompt
from server.engine.caches import block_hash
from server.engine.shares import Account
from server.grammar import Matcher
from server.wire import Sampling, TokenLogprob


class Order(NamedTuple):
    """A request's position by age: smallest `priority` first, then earliest arrival, then first received."""

    priority: int = 0
    arrived: float = 0.0  # time.monotonic(); 0: unknown
    number: int = 0
    client: str = ""

    def seconds_since_arrival(self) -> float:
        return max(time.monotonic() - self.arrived, 0) if self.arrived else 0.0


class Sequence:
    """Tokens [0, num_computed) have their K/V in `block_table`; the rest are to be computed, and the last is sampled from.

    With `targets`, nothing is sampled: they map a position to the ids whose log-probabilities after it are reported.
    """

    account: Account  # of its request, from the scheduler

    def __init__(
        self,
        request_id: str,
        prompt: EncodedPrompt,
        sampling: Sampling,
        order: Order,
        index: int = 0,
        targets: Mapping[int, list[int]] | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.sampling = sampling
        self.order = order
        self.index = index  # which of the request's answers
        self.token_ids = list(prompt.token_ids)
        self.media_index = list(prompt.media_index)
        self.sources = list(prompt.media)
        self.num_prompt_tokens = len(prompt.token_ids)
        self.keys: list[bytes] = []  # content keys, complete once every source is known
        self.block_table: list[int] = []
        self.num_computed = 0
        self.num_cached_tokens = 0  # in the prefix cache when it first ran
        self.queue_seconds = 0.0  # from its arrival to the first step
        self.num_cached_media = 0  # media that needed no pixels then
        self.media_slots: dict[bytes, int] = {}  # key -> slot, with one reference each
        self.was_admitted = False
        self.is_waiting = False
        self.is_finished = False
        self.num_missing: int | None = None  # tokens to compute when it is admitted; None: not known yet
        self.num_scored = 0  # positions that were computed once, so that what follows them was reported
        self.turn = 0.0  # among sequences that want to run, the smallest first
        self.step = 0  # the last step that it takes part in
        seed = sampling.seed
        self.random = random.Random(f"{seed}/{index}" if index and seed is not None else seed)
        self.logprobs: list[TokenLogprob] = []  # of generated tokens, in a beam search
        self.matcher: Matcher | None = None
        self.targets = targets or {}
        # positions after which log-probabilities are reported
        self.scored = range(min(self.targets), max(self.targets) + 1) if self.targets else range(0)
        # of several answers, the first reports the prompt's log-probabilities
        self.wants_prompt_logprobs = sampling.prompt_logprobs is not None and index == 0
        if self.wants_prompt_logprobs:
            self.scored = range(self.num_prompt_tokens - 1)
        self.is_stem = False  # it is computed only for others to be forked from it
        self._hashes: list[bytes] = []  # of the full blocks, in order

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_encoded_media(self) -> int:
        return len(set(self.keys)) - self.num_cached_media

    @property
    def is_computed(self) -> bool:
        return self.num_computed == len(self.token_ids)

    @property
    def num_left(self) -> int:
        """Return how many tokens are to be computed; a sequence that waits may find some of them in the cache."""
        if self.is_waiting:
            return len(self.token_ids) if self.num_missing is None else self.num_missing
        return len(self.token_ids) - self.num_computed

    @property
    def first_computed(self) -> int:
        """The position of the first token that must be computed even if it is cached."""
        if self.num_scored < self.scored.stop:
            return min(len(self.token_ids) - 1, max(self.scored.start, self.num_scored))
        return len(self.token_ids) - 1

    def append(self, token_id: int) -> None:
        """Append a generated token, which reads the media item that the token before it reads."""
        self.token_ids.append(token_id)
        self.media_index.append(self.media_index[-1])

    def fork(
        self, index: int, token_ids: Iterable[int] = (), targets: Mapping[int, list[int]] | None = None
    ) -> Sequence:
        """Return a sequence with the same tokens, followed by `token_ids`, that holds nothing of the caches."""
        child = Sequence(self.request_id, self.prompt, self.sampling, self.order, index, targets)
        child.token_ids, child.media_index = list(self.token_ids), list(self.media_index)
        child.keys, child.logprobs, child._hashes = list(self.keys), list(self.logprobs), list(self._hashes)
        child.was_admitted = True
        for token_id in token_ids:
            child.append(token_id)
        return child

    def first_token_of(self, media: int) -> int:
        """Return the position of the first token with this media index or a later one."""
        return bisect_left(self.media_index, media)

    def block_hash(self, block: int, block_size: int) -> bytes:
        """Return the hash of a full block by its number. Hashes form a chain from the salt on and are computed once."""
        while len(self._hashes) <= block:
            start = len(self._hashes) * block_size
            span = slice(start, start + block_size)
            keys = [self.keys[i] if i >= 0 else b"" for i in self.media_index[span]]
            parent = self._hashes[-1] if self._hashes else self.prompt.salt
            self._hashes.append(block_hash(parent, self.token_ids[span], keys))
        return self._hashes[block]
