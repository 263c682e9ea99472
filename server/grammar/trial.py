"""The trial process compiles each grammar before the worker does, in isolation, so that no grammar can harm the worker.

A grammar that crashes the compiler, or takes too much time or memory, ends this process alone. The messages on its
connection are msgpack: `Setup`, answered by an empty one, and then grammars, each answered by a `Verdict`.
"""

from __future__ import annotations

import logging
import resource
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
from llguidance import LLTokenizer

from server.grammar import GrammarError, compiler, heap
from server.grammar.compiler import Source
from server.grammar.refusals import NAMES, sentence
from server.wire import Grammar

# seconds of processor time per grammar, and bytes of memory in addition to those of the idle process
MAX_SECONDS = 1.0
MAX_MEMORY_BYTES = 1 << 26
TOO_LARGE = f"takes more than {MAX_MEMORY_BYTES >> 20} MiB of memory to compile"
READY = b""
FIRST = Grammar(kind="regex", text="a")
DATA_PAGES = 5  # the field of /proc/self/statm


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """The tokenizer in the form of `tokenizers`, and the ids of its tokens that end an answer."""

    tokenizer: str
    eos_ids: tuple[int, ...]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a trial: why the grammar is refused, or else what the worker compiles."""

    refusal: str = ""
    source: Source = Source()
    reason: str = ""  # of a refusal, for the log: a library's words, or the type of an unexpected error
    unexpected: str = ""


encode = msgspec.msgpack.Encoder().encode
decode_setup = msgspec.msgpack.Decoder(Setup)
decode_grammar = msgspec.msgpack.Decoder(Grammar)
decode_verdict = msgspec.msgpack.Decoder(Verdict)


def verdict(grammar: Grammar, table: LLTokenizer) -> Verdict:
    try:
        made = compiler.source(grammar, table)
        before = heap.num_bytes()
        state = compiler.begin(grammar.kind, made.text, table)
        num_bytes = heap.num_bytes() - before
        del state  # until here, it holds its memory
        return Verdict(source=msgspec.structs.replace(made, num_bytes=max(num_bytes, 0)))
    except GrammarError as error:
        return Verdict(refusal=str(error), reason=error.reason)
    except MemoryError as error:
        return Verdict(refusal=f"this {NAMES[grammar.kind]} {TOO_LARGE}", reason=type(error).__name__)
    except BaseException as error:  # a panic of llguidance is not an Exception
        return Verdict(refusal=sentence(grammar.kind, ""), unexpected=type(error).__name__)


def serve(connection: Connection) -> None:
    """Answer grammars until the other end is closed, which it may be before this process is ready."""
    with suppress(EOFError, ConnectionError):
        _answer_all(connection)


def _receive(connection: Connection) -> bytes:
    """Return the next message. Raises `EOFError` at the end, which may be within a message if the worker was killed."""
    try:
        return connection.recv_bytes()
    except OSError as error:
        raise EOFError from error


def _answer_all(connection: Connection) -> None:
    setup = decode_setup.decode(_receive(connection))
    table = LLTokenizer(setup.tokenizer, eos_token=list(setup.eos_ids))
    verdict(FIRST, table)  # what the first use allocates is not a grammar's
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send_bytes(READY)
    while True:
        grammar = decode_grammar.decode(_receive(connection))
        _limit_memory()
        # without a handler, the signal ends the process, also while native code runs
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        reply = verdict(grammar, table)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(encode(reply))


def _limit_memory() -> None:
    """Limit the memory of the next grammar: what others have left does not count."""
    heap.trim()
    if (status := Path("/proc/self/statm")).exists():
        used = int(status.read_text().split()[DATA_PAGES]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = used + MAX_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    logging.disable()
    serve(Connection(int(sys.argv[1])))
