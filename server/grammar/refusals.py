"""Sentences for clients about grammars that llguidance refuses. The library's own words are only in the log."""

from __future__ import annotations

from server.grammar import GrammarError

# the kinds of grammars in messages
NAMES = {"choice": "choice", "regex": "regular expression", "json": "JSON schema"}
MAX_REASON = 1000
# sentences by words of llguidance 1.9; the first that occur in its message count
CAUSES = {
    "look-around": "look-around is not supported in a regular expression",
    "lookaround": "look-around is not supported in a regular expression, nor are \\b, \\B, and ^ or $ in its middle",
    "backreference": "references to groups are not supported in a regular expression",
    "nested parentheses": "a regular expression has too many groups in each other",
    "unclosed group": "invalid regular expression: a group is not closed",
    "unopened group": "invalid regular expression: a group is not opened",
    "unclosed character class": "invalid regular expression: a class of characters is not closed",
    "invalid character class range": "invalid regular expression: a range of characters is empty",
    "repetition operator missing expression": "invalid regular expression: a repetition repeats nothing",
    "regex parse error": "invalid regular expression",
    "oneOf constraints": "a oneOf has parts that the same value may match: use anyOf, or constants that differ",
    "are not disjoint": "patternProperties has patterns that the same name may match",
    "min/maxProperties only": "minProperties and maxProperties are supported only if all properties are required",
    "circular references": "a $ref next to other keywords leads back to itself",
    "NoExtensionBias": "nothing matches the grammar; in a schema, a $ref may lead back to itself, or no multiple of a "
    "multipleOf may be between the bounds",
    "Unsatisfiable schema": "a part of the schema matches no value",
    "Regex is empty": "no text matches all patterns, formats and lengths of a value",
    "number of symbols": "the grammar has too many symbols, the limit is 20000",
    "schema too large": "the schema has too many combinations of allOf, anyOf and oneOf",
    "stack level": "the schema has too many combinations of allOf, anyOf and oneOf",
    # of llguidance, and of Python's reader of JSON
    "recursion": "the schema is nested too deeply: about 60 nested objects are accepted",
    "Invalid type": "a type is null, boolean, integer, number, string, array or object",
    "type must be": "a type is null, boolean, integer, number, string, array or object",
    "if regex is empty": "the patterns, formats and lengths of a value take too long together",
    "max is 2000": "too many parts of the grammar may come next, the limit is 2000",
    "tokens take too long": "the parts of the grammar that may come next take too long to find",
    "lexer": "the patterns and texts of the grammar are too complex",
    "fuel": "the patterns and texts of the grammar are too complex",
    "too many digits": "a multipleOf has too many digits",
    "too big": "the grammar is too large",
    "too many": "the grammar is too complex",
    "Expected": "a keyword has a value of another type than JSON schema requires",
    "must be": "a keyword has a value of another type than JSON schema requires",
}


def sentence(kind: str, reason: str, verb: str = "compiled") -> str:
    """Return why a grammar of a kind cannot be compiled or followed, by llguidance's reason."""
    sentences = (sentence for words, sentence in CAUSES.items() if words in reason)
    return next(sentences, f"this {NAMES[kind]} cannot be {verb}")


def refusal(kind: str, reason: str) -> GrammarError:
    """Return the error for llguidance's reason."""
    return GrammarError(sentence(kind, reason), reason[:MAX_REASON])
