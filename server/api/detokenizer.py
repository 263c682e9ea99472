"""Token ids to text that may be shown: never half a character, never the beginning of a stop string.

A token alone has no text: bytes of one character lie in several tokens, and a leading space depends on what stands
before. So a small window of ids is decoded twice, without and with the new token, and the difference is its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

# ids of the prompt in front of the first one: enough for a decoder that strips or joins at the border
CONTEXT = 4
# a character has at most four bytes; a run of ids that is still none after twice as many never becomes one
MAX_HELD = 8
REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def token(self, token_id: int) -> str: ...


class Detokenizer:
    """Feeds on one token at a time; `context` holds the ids before the first one, whose text was shown elsewhere."""

    def __init__(self, decoder: Decoder, context: Sequence[int] = ()) -> None:
        self._decoder = decoder
        self._window = _whole_characters(decoder, context)
        self._shown = len(self._window)

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is incomplete."""
        self._window.append(token_id)
        text = self._unshown()
        if (text.endswith(REPLACEMENT) or not text) and len(self._window) - self._shown < MAX_HELD:
            return ""
        self._advance()
        return text

    def finish(self) -> str:
        """What is still held, as the decoder shows an incomplete character."""
        text = self._unshown()
        self._advance()
        return text

    def _unshown(self) -> str:
        before = self._decoder.decode(self._window[: self._shown])
        return self._decoder.decode(self._window)[len(before) :]

    def _advance(self) -> None:
        """The ids shown last are the next context: they begin and end with a whole character."""
        self._window = self._window[self._shown :]
        self._shown = len(self._window)


def _whole_characters(decoder: Decoder, ids: Sequence[int]) -> list[int]:
    """The last few ids, from the beginning of a character to the end of one; none if there is no such place."""
    tails = (list(ids[-length:]) for length in range(CONTEXT, CONTEXT + 4))
    return next((tail for tail in tails if REPLACEMENT not in decoder.decode(tail)), [])


class StopStrings:
    """Lets text through up to the first stop string; an end that may become one is held back."""

    def __init__(self, stop: Sequence[str], *, include: bool = False) -> None:
        self._stop = stop
        self._include = include
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        if not self._stop or self.is_stopped:
            return "" if self.is_stopped else text
        self._held += text
        found = [(place, len(stop)) for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            # the one that is complete first ends the text, wherever another began
            place, length = min(found, key=lambda match: (match[0] + match[1], match[0]))
            self.is_stopped = True
            return self._held[: place + length * self._include]
        keep = max(map(self._overlap, self._stop))
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        text, self._held = ("" if self.is_stopped else self._held), ""
        return text

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


def token_text(decoder: Decoder, token_id: int) -> str:
    """One token as a name for log-probabilities: its text where it has one by itself, else its spelling."""
    spelling = decoder.token(token_id)
    text = decoder.decode([token_id], skip_special_tokens=False)
    if REPLACEMENT in text or not text:
        return spelling
    return f" {text}" if spelling.startswith("▁") and not text.startswith(" ") else text
