"""A sequence: its tokens so far, which media each reads, and the blocks and slots that it holds of the caches."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from model.config import AlonePositions
from model.prompt import EncodedPrompt
from server.engine.caches.blocks import block_hash
from server.engine.caches.spans import Layout, PromptSpans
from server.engine.lookup import Lookup
from server.engine.shares import Account
from server.grammar.matcher import Matcher
from server.wire import Sampling, TokenLogprob


class QueueOrder(NamedTuple):
    """A request's position by age: smallest `priority` first, then earliest arrival, then first received."""

    priority: int = 0
    arrived: float = 0.0  # time.monotonic(); 0: unknown
    number: int = 0
    client: str = ""

    def seconds_since_arrival(self) -> float:
        return max(time.monotonic() - self.arrived, 0) if self.arrived else 0.0


@dataclass(slots=True, eq=False, repr=False)
class Sequence:
    """Tokens [0, num_computed) have their K/V in `block_table`; the rest are to be computed, and the last is sampled from.

    If its prompt's shots attend alone, it has `spans` once the content of its media is known, and tokens, sources and keys
    are in the order of the `layout`, in which shots that are not begun may change places. With `targets`, nothing is
    sampled: they map a position to the ids whose log-probabilities after it are reported.
    """

    request_id: str
    prompt: EncodedPrompt
    sampling: Sampling
    order: QueueOrder
    index: int = 0  # the index of the answer within its request
    targets: Mapping[int, list[int]] = field(default_factory=dict)

    account: Account = field(init=False)  # of its request, once it is queued
    token_ids: list[int] = field(init=False)
    media_index: list[int] = field(init=False)
    sources: list[bytes] = field(init=False)
    keys: list[bytes] = field(init=False, default_factory=list)  # content keys, complete once every source is known
    num_prompt_tokens: int = field(init=False)
    num_computed: int = field(init=False, default=0)
    block_table: list[int] = field(init=False, default_factory=list)
    media_slots: dict[bytes, int] = field(init=False, default_factory=dict)  # key -> slot, with one reference each
    num_missing: int | None = field(init=False, default=None)  # tokens to compute if it is admitted now, if known
    was_admitted: bool = field(init=False, default=False)
    is_waiting: bool = field(init=False, default=False)
    is_finished: bool = field(init=False, default=False)
    is_stem: bool = field(init=False, default=False)  # it is computed only to be forked
    step: int = field(init=False, default=0)  # the last step in which it took part
    turn: float = field(init=False, default=0.0)  # the order among sequences that can run, the smallest first
    left_seat_at: int = field(init=False, default=-1)  # `num_computed` when it last lost its seat to another request

    # when it first ran: tokens found in the prefix cache, seconds since its arrival, media that needed no pixels
    num_cached_tokens: int = field(init=False, default=0)
    queue_seconds: float = field(init=False, default=0.0)
    num_cached_media: int = field(init=False, default=0)

    random: Random = field(init=False)
    matcher: Matcher | None = field(init=False, default=None)
    lookup: Lookup | None = field(init=False, default=None)  # from its second token on, if tokens are proposed for it
    logprobs: list[TokenLogprob] = field(init=False, default_factory=list)  # of generated tokens, in a beam search
    scored: range = field(init=False)  # positions after which log-probabilities are reported
    num_scored: int = field(init=False, default=0)  # positions whose log-probabilities have been reported
    wants_prompt_logprobs: bool = field(init=False)

    spans: PromptSpans | None = field(init=False, default=None)
    layout: Layout | None = field(init=False, default=None)
    order_of_shots: list[int] = field(init=False, default_factory=list)  # as computed; numbers are those of `spans`
    _hashes: list[bytes] = field(init=False, default_factory=list)  # hashes of the full blocks, in order

    def __post_init__(self) -> None:
        prompt, sampling = self.prompt, self.sampling
        self.token_ids, self.media_index = list(prompt.token_ids), list(prompt.media_index)
        self.sources, self.num_prompt_tokens = list(prompt.media), len(prompt.token_ids)
        seed = None if sampling.seed is None else sampling.seed % 2**64  # `Random` ignores the sign
        self.random = Random(f"{seed}/{self.index}" if self.index and seed is not None else seed)
        self.scored = range(min(self.targets), max(self.targets) + 1) if self.targets else range(0)
        # of several answers, the first reports the prompt's log-probabilities
        self.wants_prompt_logprobs = sampling.prompt_logprobs is not None and self.index == 0
        if self.wants_prompt_logprobs:
            self.scored = range(self.num_prompt_tokens - 1)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_encoded_media(self) -> int:
        return len(set(self.keys)) - self.num_cached_media

    @property
    def is_greedy(self) -> bool:
        """True if the next token is the most likely one, and the logits are changed only by suppressed ids."""
        sampling = self.sampling
        is_shaped = self.matcher is not None or self.num_output_tokens < sampling.min_tokens or sampling.logit_bias
        return not (sampling.is_random or sampling.beam_width or is_shaped or self.is_penalised)

    @property
    def needs_last_token(self) -> bool:
        """True if the host has to know each token before the next one can be chosen."""
        sampling = self.sampling
        is_shaped = self.matcher is not None or self.num_output_tokens < sampling.min_tokens
        return bool(is_shaped or self.is_penalised or sampling.beam_width or self.targets)

    @property
    def is_penalised(self) -> bool:
        sampling = self.sampling
        return bool(sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty)

    @property
    def is_computed(self) -> bool:
        return self.num_computed == len(self.token_ids)

    @property
    def num_left(self) -> int:
        """The number of tokens to compute; if the sequence waits, some of them may be in the cache."""
        if self.is_waiting:
            return len(self.token_ids) if self.num_missing is None else self.num_missing
        return len(self.token_ids) - self.num_computed

    @property
    def first_computed(self) -> int:
        """The position of the first token that must be computed even if it is cached."""
        if self.num_scored < self.scored.stop:
            return min(len(self.token_ids) - 1, max(self.scored.start, self.num_scored))
        return len(self.token_ids) - 1

    @property
    def query_place(self) -> tuple[int, int]:
        """The first block and the first token after shots that attend alone; zeros without such shots."""
        return (0, 0) if self.layout is None else (self.layout.first_query_block, self.layout.query_start)

    def append(self, token_id: int) -> None:
        """Append a generated token, which reads the media item that the token before it reads."""
        self.token_ids.append(token_id)
        self.media_index.append(self.media_index[-1])

    def updated_lookup(self) -> Lookup:
        """Return the lookup of a sequence that decodes, which has read all of its tokens."""
        if self.lookup is None:
            self.lookup = Lookup()
            self.lookup.begin(self.token_ids[: self.num_prompt_tokens])
        self.lookup.extend(self.token_ids[len(self.lookup) :])
        return self.lookup

    def identify(self, keys: list[bytes], block_size: int, alone_positions: AlonePositions) -> None:
        """Note the content keys of all media, and with them the spans of a prompt whose shots attend alone."""
        self.keys = keys
        if self.prompt.has_spans:
            self.spans = PromptSpans.of(self.prompt, keys, block_size, alone_positions)
            self._hashes = self.spans.hashes
            self.arrange(range(len(self.spans.shots)))

    def arrange(self, shots: Iterable[int]) -> Layout:
        """Put the shots, numbered as in the block table, into the order in which they are computed."""
        spans, order = self.spans, list(shots)
        assert spans is not None
        if self.layout is not None and order == self.order_of_shots:
            return self.layout
        self.order_of_shots = order
        start = self.prompt.span_starts[-1]
        query = self.token_ids[start:]
        arranged = [spans.shots[shot] for shot in order]
        self.layout = Layout(spans, order)
        self.token_ids = [*spans.prefix, *(token_id for shot in arranged for token_id in shot.token_ids), *query]
        index = [[media] * len(shot.token_ids) for media, shot in enumerate(arranged)]
        self.media_index = [-1] * len(spans.prefix) + [media for indices in index for media in indices]
        self.media_index += [len(arranged)] * len(query)
        self.sources = [*(shot.source for shot in arranged), self.sources[-1]]
        self.keys = [*(shot.key for shot in arranged), self.keys[-1]]
        return self.layout

    def fork(
        self, index: int, token_ids: Iterable[int] = (), targets: Mapping[int, list[int]] | None = None
    ) -> Sequence:
        """Return a sequence with the same tokens, followed by `token_ids`, that holds nothing of the caches."""
        child = Sequence(self.request_id, self.prompt, self.sampling, self.order, index, targets or {})
        child.token_ids, child.media_index = list(self.token_ids), list(self.media_index)
        child.keys, child.logprobs, child._hashes = list(self.keys), list(self.logprobs), list(self._hashes)
        child.sources, child.spans, child.layout = list(self.sources), self.spans, self.layout
        child.order_of_shots = self.order_of_shots
        child.was_admitted = True
        for token_id in token_ids:
            child.append(token_id)
        return child

    def share_hashes(self, other: Sequence) -> None:
        """Take the hashes of blocks from a sequence that has the same prompt, and no block of other tokens yet."""
        self._hashes = list(other._hashes)

    def first_token_of(self, media: int) -> int:
        """Return the position of the first token with this media index or a later one."""
        return bisect_left(self.media_index, media)

    def block_hash(self, block: int, block_size: int) -> bytes:
        """Return the hash of a complete block by its place in the table. Hashes form a chain and are computed once."""
        while len(self._hashes) <= block:
            first_block, first_token = self.query_place
            number = len(self._hashes) - first_block
            parent = self._hashes[-1] if self._hashes else self.prompt.salt
            if self.spans is not None and not number:
                parent = self.spans.query_parent
            start = first_token + number * block_size
            span = slice(start, start + block_size)
            keys = [self.keys[i] if i >= 0 else b"" for i in self.media_index[span]]
            self._hashes.append(block_hash(parent, self.token_ids[span], keys))
        return self._hashes[block]
