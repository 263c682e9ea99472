"""A prompt as the engine reads it, and the encoded media that it shows, by digest."""

from __future__ import annotations

from dataclasses import dataclass

from model.prompt import EncodedPrompt
from server.media.source import EncodedMedia


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    encoded: EncodedPrompt
    media: dict[bytes, EncodedMedia]

    @property
    def num_tokens(self) -> int:
        return len(self.encoded.token_ids)
