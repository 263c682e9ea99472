"""The made language's tokenizer, for the tests of training/few_shot."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer

from model.config import PromptConfig
from model.prompt import PromptTokenizer
from training.few_shot.language import train_language_tokenizer


@cache
def language_tokenizer() -> PromptTokenizer:
    tokenizer = train_language_tokenizer()
    prompt = PromptConfig(media_token="<image>", end_of_chunk="<|endofchunk|>", eos=("<|endofchunk|>",))
    return PromptTokenizer(Tokenizer.from_str(tokenizer.to_str()), tokenizer, prompt)
