"""Answers a `Generate` by independent sampling, from the first step of the prompt to the last finish reason.

The first answer computes the prompt; the others are held back until they can share it.
"""

from __future__ import annotations

from collections.abc import Iterable

from server.engine.device.sampler import Result
from server.engine.residents import Residents
from server.engine.sequence import QueueOrder, Sequence
from server.engine.tasks.task import RequestError, SequenceTask, check_prompt, finished_events
from server.grammar import GrammarError, TrialUnavailable
from server.grammar.compiler import Compilation
from server.wire import Admitted, FinishReason, Generate, MediaWanted, Outbound, PromptScored, Token, TokenLogprob


class Answers(SequenceTask):
    """The answers of one request; if it has a grammar, they begin when that is compiled.

    Raises `RequestError` for a prompt that is too long, or whose requested log-probabilities would have no meaning.
    """

    def __init__(
        self,
        request: Generate,
        order: QueueOrder,
        residents: Residents,
        eos_ids: frozenset[int],
        compiling: Compilation | None = None,
    ) -> None:
        super().__init__(request.request_id, request.prompt.media)
        length, max_tokens = len(request.prompt.token_ids), request.sampling.max_tokens
        limit = residents.config.max_model_len
        if length + max_tokens > limit:
            raise RequestError(f"{length} prompt tokens and max_tokens {max_tokens} exceed max_model_len {limit}")
        check_prompt(request.prompt, max_tokens, residents)
        if request.prompt.has_spans and request.sampling.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs cannot be combined with shots that attend alone")
        self._request = request
        self._residents = residents
        self._stop_ids = frozenset(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            self._stop_ids |= eos_ids
        self._prompt_logprobs: dict[int, TokenLogprob] = {}
        self._is_prompt_scored = False
        self._live: dict[int, Sequence] = {}
        # the other beams of a search are forked from the first
        num_sequences = 1 if request.sampling.beam_width else request.sampling.n
        self._held_back = [
            Sequence(request.request_id, request.prompt, request.sampling, order, index)
            for index in range(num_sequences)
        ]
        self.first_sequence = self._held_back[0]
        self.compiling = compiling
        if compiling is None:
            self._live[0] = self._held_back.pop(0)

    def prepare(self) -> list[Outbound]:
        """Begin once the grammar is compiled."""
        if self.compiling is None or not self.compiling.done():
            return []
        compiling, self.compiling = self.compiling, None
        try:
            matcher = compiling.result()
        except GrammarError as error:
            assert self._request.sampling.grammar is not None
            field = self._request.sampling.grammar.field
            return self.end("error", f"{field}: {error}", param=field)
        except TrialUnavailable as error:
            return self.end("error", str(error), is_temporary=True)
        for sequence, copied in zip(self._held_back, matcher.copies(len(self._held_back)), strict=True):
            sequence.matcher = copied
        self._live[0] = self._held_back.pop(0)
        return [MediaWanted(source) for source in self._residents.add(self.first_sequence)]

    def handle_admission(self, sequence: Sequence) -> Iterable[Outbound]:
        yield Admitted(
            request_id=self.request_id,
            queue_seconds=sequence.queue_seconds,
            cached_tokens=sequence.num_cached_tokens,
            media_encoded=sequence.num_encoded_media,
            media_cached=sequence.num_cached_media,
        )

    def handle_result(self, result: Result) -> Iterable[Outbound]:
        events = self._score_prompt(result) if result.row.sequence.wants_prompt_logprobs else []
        if not result.row.samples:
            return events
        if self._request.sampling.max_tokens == 0:
            return [*events, *self.end("length")]
        if self._held_back:
            events += self._begin_others()
        events += self._advance(result)
        return events

    def end_answer(self, index: int) -> Iterable[Outbound]:
        """Abort one of several answers, once the prompt is computed: until then its sequence is that of all answers."""
        has_begun = index in self._live and not self._held_back
        return self._end_early(self._live[index], "abort") if has_begun else []

    def _unfinished_answers(self) -> Iterable[int]:
        return sorted([*self._live, *(sequence.index for sequence in self._held_back)])

    def release(self) -> None:
        for sequence in self._live.values():
            self._residents.finish(sequence)
        self._live = {}
        if self.compiling is not None:
            self.compiling.leave()

    def _begin_others(self) -> list[Outbound]:
        """Queue the answers that were held back: they share the blocks of the computed prompt."""
        sequences, self._held_back = self._held_back, []
        for sequence in sequences:
            sequence.share_hashes(self.first_sequence)
        self._live.update((sequence.index, sequence) for sequence in sequences)
        return [MediaWanted(source) for sequence in sequences for source in self._residents.add(sequence)]

    def _score_prompt(self, result: Result) -> list[Outbound]:
        """Collect prompt log-probabilities by position; send them once the prompt is computed, before its first token."""
        sequence = result.row.sequence
        self._prompt_logprobs.update(enumerate(result.prompt_logprobs, start=result.row.start + 1))
        if self._is_prompt_scored or not result.row.samples:
            return []
        self._is_prompt_scored = True
        logprobs = [self._prompt_logprobs.get(i) for i in range(sequence.num_prompt_tokens)]
        return [PromptScored(request_id=self.request_id, logprobs=logprobs)]

    def _advance(self, result: Result) -> Iterable[Outbound]:
        """Append the sampled token to its answer."""
        sequence, token_id = result.row.sequence, result.token_id
        assert token_id is not None
        sequence.append(token_id)
        reason = self._finish_reason(sequence, token_id)
        if (matcher := sequence.matcher) is not None and reason != "stop":
            matcher.accept(token_id)
            if matcher.is_complete:
                reason = None  # the answer is whole even at its maximum length: it ends after its last token
        events: list[Outbound] = [
            Token(
                request_id=self.request_id,
                index=sequence.index,
                token_id=token_id,
                logprob=result.logprob,
                finish_reason=reason,
                is_proposed=result.is_proposed,
                num_rejected=result.num_rejected,
            )
        ]
        if reason is not None:
            self._finish(sequence)
        elif matcher is not None and matcher.is_complete:
            events += self._end_complete(sequence)
        return events

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        if token_id in self._stop_ids:
            return "stop"
        return "length" if sequence.num_output_tokens >= sequence.sampling.max_tokens else None

    def _end_complete(self, sequence: Sequence) -> Iterable[Outbound]:
        """End an answer whose grammar permits no further token; all answers with an error if it is too short."""
        sampling = sequence.sampling
        if sampling.grammar is not None and sequence.num_output_tokens < sampling.min_tokens:
            field = sampling.grammar.field
            message = f"{field}: the answer is complete after {sequence.num_output_tokens} tokens, before min_tokens"
            return self.end("error", message, param=field)
        return self._end_early(sequence, "stop")

    def _end_early(self, sequence: Sequence, reason: FinishReason) -> list[Outbound]:
        """End one answer without a last token."""
        self._finish(sequence)
        return finished_events(self.request_id, [sequence.index], reason)

    def _finish(self, sequence: Sequence) -> None:
        """Release one answer; with the last of them, the request is finished."""
        self._residents.finish(sequence)
        del self._live[sequence.index]
        self.is_finished = not self._live and not self._held_back
