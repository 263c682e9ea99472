"""A trial process that compiles JSON schemas as they are, without the limits that refuse most of what could harm it."""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection

from llguidance import LLMatcher, LLTokenizer

from server.grammar import compiler, trial
from server.wire import Grammar


def unlimited(grammar: Grammar, table: LLTokenizer) -> compiler.Source:
    return compiler.Source(text=LLMatcher.grammar_from_json_schema(grammar.text))


if __name__ == "__main__":
    compiler.source = unlimited
    trial.serve(Connection(int(sys.argv[1])))
