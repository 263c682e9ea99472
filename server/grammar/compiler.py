"""Compiles grammars by llguidance: a choice of strings, a regular expression or a JSON schema.

A grammar is compiled once, in a thread, and copied for each answer. Its size and llguidance's counters of work are limited.
Since some grammars still take seconds and gigabytes, or crash the compiler, a process compiles each one first
(`trials.py`). This module does not import torch.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from heapq import heappop, heappush
from itertools import count
from threading import Lock
from typing import TYPE_CHECKING, Protocol

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from model.prompt import PromptTokenizer
from server.grammar import GrammarError, TrialUnavailable
from server.grammar.json_schema import closed
from server.grammar.matcher import Beginning, Ending, Matcher
from server.grammar.refusals import NAMES, refusal, sentence
from server.grammar.schema_limits import check_regex
from server.wire import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# the time to compile some grammars is quadratic in their bytes
MAX_BYTES = 1 << 17
MAX_SYMBOLS = 20_000
# limit per beginning, whose answers share them; each takes one or two kB
MAX_STATES = 20_000
MAX_COMPILED = 32
MAX_COMPILED_BYTES = 1 << 27
# its messages need not repeat the grammar
LIMITS = LLParserLimits(max_grammar_size=MAX_SYMBOLS, max_lexer_states=MAX_STATES, verbose_errors=False)
# no spaces between JSON tokens: a small model may write spaces and line breaks endlessly
COMPACT: JsonCompileOptions = {"whitespace_flexible": False}
# characters that end a part of a JSON text
ENDS_OF_PARTS = (b'"', b"}", b"]", b",")
# estimated tokens for the punctuation of a property, and for the parts that may be open when an answer has to end
PROPERTY_TOKENS = 3
OPEN_TOKENS = 8

logger = logging.getLogger(__name__)


def check(grammar: Grammar) -> None:
    """Check that a grammar is neither empty nor too large; compilation checks the rest. Raises `GrammarError`."""
    if grammar.kind == "choice" and not (grammar.choices and all(grammar.choices)):
        raise GrammarError("choice must have at least one string and no empty string")
    if (size := num_bytes(grammar)) > MAX_BYTES:
        raise GrammarError(f"the {NAMES[grammar.kind]} has {size} bytes, the limit is {MAX_BYTES}")
    if grammar.kind == "regex":
        check_regex(grammar.text)


def num_bytes(grammar: Grammar) -> int:
    return sum(len(text.encode()) for text in (*grammar.choices, grammar.text))


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A grammar in llguidance's own language, and the bytes of memory that it takes when it is compiled, 0 if unknown.

    `num_end_tokens`: the estimated number of tokens that end an answer in JSON.
    """

    text: str = ""
    num_end_tokens: int = 0
    num_bytes: int = 0


def source(grammar: Grammar, table: LLTokenizer) -> Source:
    """Return what is compiled for a grammar. Raises `GrammarError`."""
    check(grammar)
    match grammar.kind:
        case "choice":
            return Source(text=LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, grammar.choices))))
        case "regex":
            return Source(text=LLMatcher.grammar_from_regex(grammar.text))
        case "json":
            schema, words = closed(grammar.text)
            num_tokens = len(table.tokenize_str(json.dumps(words)))
            try:
                text = LLMatcher.grammar_from_json_schema(schema, defaults=COMPACT)
            except ValueError as error:
                raise refusal(grammar.kind, str(error)) from None
            return Source(text=text, num_end_tokens=num_tokens + PROPERTY_TOKENS * len(words) + OPEN_TOKENS)


def begin(kind: str, text: str, table: LLTokenizer) -> LLMatcher:
    """Return the state at the beginning of a source of a kind of grammar, with its first mask, which is the slowest one.

    Raises `GrammarError`.
    """
    state = LLMatcher(table, text, log_level=0, limits=LIMITS)
    if not state.is_error():
        state.compute_bitmask()  # copies reuse its computed states
    if state.is_error():
        raise refusal(kind, state.get_error())
    return state


class Trier(Protocol):
    """Tries a grammar where it can do no harm, and returns its source, so that Python need not read it once more.

    Raises its `GrammarError`, or `TrialUnavailable`.
    """

    def start(self) -> object: ...

    def check(self, grammar: Grammar) -> Source: ...


class Compilation(Future[Matcher]):
    """The state at a grammar's beginning, which `num_users` requests wait for. It is cancelled when all of them leave.

    It waits in the turns of all `clients` that need it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_users = 0
        self.clients: set[str] = set()

    @property
    def is_void(self) -> bool:
        """True if the grammar has to be compiled again."""
        if self.cancelled() or not self.done():
            return self.cancelled()
        return isinstance(self.exception(), TrialUnavailable) if self.exception() else self.result().is_spent

    @property
    def num_bytes(self) -> int:
        """The memory of the grammar, 0 until it is compiled."""
        is_compiled = self.done() and not self.is_void and self.exception() is None
        return self.result().num_bytes if is_compiled else 0

    def leave(self) -> None:
        """End the wait of one request."""
        self.num_users -= 1
        if not self.num_users:
            self.cancel()


class Grammars:
    """Compiles grammars for one tokenizer in a dedicated thread, and caches the last used ones.

    Clients take turns; of a client's grammars, the smallest is the first. With `trials`, each grammar is tried first.
    """

    def __init__(
        self, tokenizer: PromptTokenizer, trials: Trier | None = None, max_compiled: int = MAX_COMPILED
    ) -> None:
        self._tokenizer = tokenizer
        self._trials = trials
        self._max_compiled = max_compiled
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._compiled: OrderedDict[tuple[bytes, Grammar], Compilation] = OrderedDict()
        self._waiting = Waiting()

    @cached_property
    def _table(self) -> LLTokenizer:
        """The table of tokens. Building it holds the interpreter's lock, unlike compiling a grammar."""
        return LLTokenizer(self._tokenizer.to_json(), eos_token=list(self._tokenizer.eos_ids))

    def build_table(self) -> None:
        """Build the table of tokens in the thread, so that the first grammar does not wait for it."""
        self._thread.submit(lambda: self._table)

    def start_trials(self) -> None:
        """Start the trials in the thread, so that the first grammar does not wait for them."""
        if self._trials is not None:
            self._thread.submit(self._trials.start)

    def compile(self, grammar: Grammar, salt: bytes = b"", client: str = "") -> Compilation:
        """Return the state at the grammar's beginning, to be copied for each answer, or its error.

        That is a `GrammarError`, or `TrialUnavailable`, which is not cached. Prompts with different salts share no
        compiled grammar. A request that waits no longer leaves.
        """
        key = salt, grammar
        self._compiled = OrderedDict(item for item in self._compiled.items() if not item[1].is_void)
        compiling = self._compiled.setdefault(key, Compilation())
        if client not in compiling.clients and not compiling.done():
            compiling.clients.add(client)
            self._waiting.add(client, grammar, compiling)
            self._thread.submit(self._compile_next)
        self._compiled.move_to_end(key)
        self._evict()
        compiling.num_users += 1
        return compiling

    def _evict(self) -> None:
        """Forget the grammars used longest ago, but not the last one."""
        num_bytes = sum(compiling.num_bytes for compiling in self._compiled.values())
        while len(self._compiled) > 1 and (len(self._compiled) > self._max_compiled or num_bytes > MAX_COMPILED_BYTES):
            _, oldest = self._compiled.popitem(last=False)
            num_bytes -= oldest.num_bytes

    def _compile_next(self) -> None:
        grammar, compiling = self._waiting.take()
        if compiling.done() or not compiling.set_running_or_notify_cancel():
            return  # it was cancelled, or compiled in the turn of another client
        try:
            compiling.set_result(self._matcher(grammar))
        except GrammarError as error:
            logger.info("a grammar is refused", extra={"kind": grammar.kind, "error": error.reason or str(error)})
            compiling.set_exception(error)
        except TrialUnavailable as error:
            compiling.set_exception(error)
        except BaseException:  # a panic of llguidance is not an Exception; a request must not wait for ever
            logger.exception("a grammar could not be compiled")
            compiling.set_exception(GrammarError(sentence(grammar.kind, "")))

    def _matcher(self, grammar: Grammar) -> Matcher:
        made = source(grammar, self._table) if self._trials is None else self._trials.check(grammar)
        ending = self._ending(made.num_end_tokens)
        beginning = Beginning(partial(begin, grammar.kind, made.text, self._table))
        return Matcher(beginning, self._table, ending, made.num_bytes)

    def _ending(self, num_tokens: int) -> Ending | None:
        """Return how an answer in JSON is ended; other grammars have no unbounded parts that could be cut, so None."""
        if not num_tokens:
            return None
        ends = [self._table.tokenize_bytes(end) for end in ENDS_OF_PARTS]
        if any(len(end) != 1 for end in ends):
            return None
        quote, brace, bracket, comma = (token_id for (token_id,) in ends)
        eos = self._tokenizer.eos_ids
        return Ending(num_tokens=num_tokens, eos=eos, quote=quote, brace=brace, bracket=bracket, comma=comma)


class Waiting:
    """Grammars that wait for the thread: by client in turn, and the smallest of a client first."""

    def __init__(self) -> None:
        self._by_client: OrderedDict[str, list[tuple[int, int, Grammar, Compilation]]] = OrderedDict()
        self._numbers = count()
        self._lock = Lock()

    def add(self, client: str, grammar: Grammar, compiling: Compilation) -> None:
        with self._lock:
            waiting = self._by_client.setdefault(client, [])
            heappush(waiting, (num_bytes(grammar), next(self._numbers), grammar, compiling))

    def take(self) -> tuple[Grammar, Compilation]:
        """Take the next grammar; its client becomes the last in turn."""
        with self._lock:
            client, waiting = self._by_client.popitem(last=False)
            *_, grammar, compiling = heappop(waiting)
            if waiting:
                self._by_client[client] = waiting
            return grammar, compiling
