"""The trial process compiles each grammar before the worker does, in isolation, so that no grammar can harm the worker.

A grammar that crashes the compiler, or takes too much time or memory, ends this process alone. The messages on its
connection are msgpack: `Setup`, answered by an empty one, and then grammars, each answered by a `Verdict`.
"""

from __future__ import annotations

import logging
import resource
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
from llguidance import LLTokenizer

from server.grammar import GrammarError
from server.grammar.compiler import begin
from server.grammar.refusals import sentence
from server.wire import Grammar

# seconds of processor time per grammar, and bytes of memory in addition to those of the idle process
MAX_SECONDS = 1.0
MAX_MEMORY_BYTES = 1 << 26
READY = b""
FIRST = Grammar(kind="regex", text="a")
DATA_PAGES = 5  # the field of /proc/self/statm


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """The tokenizer in the form of `tokenizers`, and the ids of its tokens that end an answer."""

    tokenizer: str
    eos_ids: tuple[int, ...]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Why a grammar is refused, "" if it is not; for the log, a library's reason, or the type of an unexpected error."""

    refusal: str = ""
    reason: str = ""
    unexpected: str = ""


encode = msgspec.msgpack.Encoder().encode
decode_setup = msgspec.msgpack.Decoder(Setup)
decode_grammar = msgspec.msgpack.Decoder(Grammar)
decode_verdict = msgspec.msgpack.Decoder(Verdict)


def verdict(grammar: Grammar, table: LLTokenizer) -> Verdict:
    try:
        begin(grammar, table)
    except GrammarError as error:
        return Verdict(refusal=str(error), reason=error.reason)
    except BaseException as error:  # a panic of llguidance is not an Exception
        return Verdict(refusal=sentence(grammar.kind, ""), unexpected=type(error).__name__)
    return Verdict()


def serve(connection: Connection) -> None:
    """Answer grammars until the other end is closed."""
    setup = decode_setup.decode(connection.recv_bytes())
    table = LLTokenizer(setup.tokenizer, eos_token=list(setup.eos_ids))
    verdict(FIRST, table)  # what the first use allocates is not a grammar's
    _limit_memory()
    connection.send_bytes(READY)
    while True:
        try:
            grammar = decode_grammar.decode(connection.recv_bytes())
        except EOFError:
            return
        # without a handler, the signal ends the process, also while native code runs
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        reply = verdict(grammar, table)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(encode(reply))


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if (status := Path("/proc/self/statm")).exists():
        used = int(status.read_text().split()[DATA_PAGES]) * resource.getpagesize()
        limit = used + MAX_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    logging.disable()
    serve(Connection(int(sys.argv[1])))
