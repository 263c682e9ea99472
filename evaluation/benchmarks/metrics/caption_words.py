"""Splits captions into the words of coco-caption's tokenizer, a Java program, as far as English captions need it.

Words are in lower case, clitics are separate, and there is no punctuation. Brackets are words, as in that tokenizer. A
period without a space after it joins two words, and some abbreviations keep theirs. The rules are derived from the outputs
of that tokenizer, of which `tests/goldens` has a part.
"""

from __future__ import annotations

import re

# characters and entities that are written in another way
_REPLACED = {
    **{"’": "'", "\xad": "", "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": ""},
    **{"¢": " cents ", "£": " # ", "€": " $ "},
    **{"½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 "},
    **{"(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- ", "{": " -lcb- ", "}": " -rcb- "},
}
_PARTS = {
    **{"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na"},
    **{"gimme": "gim me", "lemme": "lem me", "'tis": "'t is", "'twas": "'t was"},
}
_ABBREVIATIONS = (
    # months, days, streets and units
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri "
    "st ave blvd rd ct sq mt ft bldg ste "
    # titles, offices and companies
    "mr mrs ms dr jr sr messrs mme mlle prof rev gen col lt sgt capt cmdr adm cpl pvt maj brig det insp supt atty asst "
    "gov sen rep pres hon inc co corp ltd bros dept univ assn intl natl mfg bhd pte pty "
    # states
    "calif ariz colo conn dak fla ga ind kan ky md mich minn mo mont neb nev okla penn tenn va vt wis wisc wyo "
    "vs est etc ext al ph cf tel"
)
# those that are abbreviations only before a number
_OF_NUMBERS = "no nos fig op pp ca"
_SEPARATE_AND = re.compile(r"(?<![A-Z])&|&(?![A-Z])")
_CLITIC = re.compile(r"(?<=\w)(?:n['`]t|'(?:s|m|d|ll|re|ve))(?!\w)")
_WORD = re.compile(
    rf"""n['`]t | '(?:s|m|d|ll|re|ve)(?!\w) | 'n' | (?<!\w)'(?:\d\ds?|em|til|cause|n)(?![\w'])  # clitics
    | (?<!\w)'t(?=\ (?:is|was)(?!\w))
    | (?:[dlno]|qu)'\w+ | [jy]'(?=\w) | ol'(?!\w) | (?:c'mon|ma'am|li'l|s'mores|hallowe'en|n?e'er)(?!\w)
    | -[lr][rsc]b- | </?\w+> | [!?]{{2,}} | [$%&*=/<>|\\~^°©®™•·¥±×÷→★♥´℃]  # marks that are words
    | https?://\S+ | \w+@\w+(?:\.\w+)* | [@\#][a-z]\w* | c(?:\+\+|\#)(?!\w) | [@\#]
    | (?<!\w)(?:[a-z]\.)+(?!\w)(?:-\w+)*                # initials
    | (?<!\w)ph\.d\. | (?<!\w)(?:{_ABBREVIATIONS.replace(" ", "|")})\.(?![^\W\d])
    | (?<!\w)(?:{_OF_NUMBERS.replace(" ", "|")})\.(?=\s?\d)
    | (?<!\w)[^\W\d_]+(?:\.[^\W\d_]+)+(?:-\w+)*         # a period without a space
    | (?:\+|(?<!\S)-)\d+(?:[.,:]\d+)* | (?<![\d.])\.\d+ | \+
    | \w+ (?: [-/]\w+ | &\w+ | (?<=\d)[.,:]\d+ )*""",
    re.VERBOSE,
)
_REPLACEMENT = re.compile("|".join(map(re.escape, _REPLACED)))


def tokenize(caption: str) -> list[str]:
    text = _REPLACEMENT.sub(lambda match: _REPLACED[match[0]], caption)
    text = _CLITIC.sub(r" \g<0>", _SEPARATE_AND.sub(" & ", text).lower())
    return _WORD.findall(" ".join(_PARTS.get(word, word) for word in text.split()))
