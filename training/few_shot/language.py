"""An artificial language of names and words, and a small decoder that is trained to predict the words of its texts.

    text     name word <|endofchunk|> name word <|endofchunk|> ...    a name has the same word throughout a text
    prompt   <image> word <|endofchunk|> <image> word ...             an image or a video takes the position of a name

Each text assigns new words to names, so a decoder has to look up the words in the text. It develops heads that copy words
after few steps, and compares names only after many more. A bridge between this decoder and an encoder has to direct these
heads to the words of similar images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from model.batch import NO_CACHE, MediaPages, whole_sequences
from model.config import FlamingoConfig, ResamplerConfig, VisionConfig
from model.flamingo import Flamingo
from model.folder import save_folder
from model.prompt import PromptTokenizer
from model.zoo.bridge import start_bridge
from training.ablations.small import CHUNK, small_config, train_tokenizer
from training.start import rebuild

log = logging.getLogger(__name__)
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
NUM_NAMES, NUM_WORDS = 128, 32
DIM, NUM_HEADS, HEAD_DIM = 64, 4, 32
# texts are short; with slow rotations, a head could hardly distinguish neighbouring tokens
ROPE_THETA = 100.0
# names per text and items per text; a prompt of 32 shots has 33 items
MAX_NAMES, MIN_ITEMS, MAX_ITEMS = 5, 6, 34
# the learning rate is constant until the last share of the steps
BATCH, LEARNING_RATE, WARM_UP, FINAL_SHARE = 32, 3e-3, 50, 0.3


def _invent(count: int) -> tuple[str, ...]:
    syllables = [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]
    rng = Random("names and words")
    invented: dict[str, None] = {}
    while len(invented) < count:
        invented["".join(rng.sample(syllables, 2))] = None
    return tuple(invented)


_INVENTED = _invent(NUM_NAMES + NUM_WORDS)
NAMES, WORDS = _INVENTED[:NUM_NAMES], _INVENTED[NUM_NAMES:]


def build_model(
    folder: Path,
    vision: VisionConfig,
    resampler: Callable[[ResamplerConfig], ResamplerConfig],
    encoder: dict[str, Tensor],
    steps: int,
) -> None:
    """Build a model of the decoder and an encoder's weights in `folder`, with closed gates, unless it exists already.

    `resampler` changes the small model's resampler.
    """
    if (folder / "config.json").exists():
        return
    tokenizer = train_language_tokenizer()
    config = small_config(vision, tokenizer.get_vocab_size() - 2)
    config = with_small_decoder(replace(config, resampler=resampler(config.resampler)))
    decoder = pretrained_decoder(folder.parent / "decoder.safetensors", config, tokenizer, steps)
    tensors = {**decoder, **{f"vision.{name}": tensor for name, tensor in encoder.items()}}
    bridge = start_bridge(config, tensors)
    save_folder(folder, config, rebuild(config, {**tensors, **bridge}).state_dict().items(), tokenizer.to_str())


def with_small_decoder(config: FlamingoConfig) -> FlamingoConfig:
    """Return the configuration with a narrower decoder, which a CPU trains in minutes."""
    decoder = replace(
        config.language_model,
        dim=DIM,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_HEADS,
        head_dim=HEAD_DIM,
        rotary_dim=HEAD_DIM,
        rope_theta=ROPE_THETA,
        ffn_dim=3 * DIM,
    )
    gated = replace(config.gated, num_heads=NUM_HEADS, head_dim=HEAD_DIM, ffn_dim=2 * DIM)
    return replace(config, gated=gated, language_model=decoder)


def train_language_tokenizer() -> Tokenizer:
    """Train a tokenizer in which each name and each word is one token."""
    return train_tokenizer([f" {word}" for word in NAMES + WORDS] * 50)


def pretrained_decoder(file: Path, config: FlamingoConfig, tokenizer: Tokenizer, steps: int) -> dict[str, Tensor]:
    """Return the decoder's tensors; they are computed once for all encoders."""
    if not file.exists():
        torch.manual_seed(0)
        model = Flamingo(config).requires_grad_(False)
        loss = pretrain(model, tokenizer, steps)
        log.info("the decoder's loss on taught words is %.3f after %d steps", loss, steps)
        tensors = {n: t.clone() for n, t in model.state_dict().items() if n.startswith("language_model.")}
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file)
    return load_file(file)


def draw_text(rng: Random, max_items: int = MAX_ITEMS) -> list[tuple[str, str, bool]]:
    """Draw the items of a text: name, word, and whether the text has taught the word before."""
    names = rng.sample(NAMES, rng.randint(2, MAX_NAMES))
    words = dict(zip(names, rng.sample(WORDS, len(names)), strict=True))
    taught: set[str] = set()
    items = []
    for _ in range(rng.randint(MIN_ITEMS, max_items)):
        name = rng.choice(names)
        items.append((name, words[name], name in taught))
        taught.add(name)
    return items


def pretrain(model: Flamingo, tokenizer: Tokenizer, steps: int) -> float:
    """Train the decoder to write the words that a text has taught, and the ends of chunks; return the last loss."""
    prompt = PromptTokenizer(Tokenizer.from_str(tokenizer.to_str()), tokenizer, model.config.prompt)
    ids = {word: token_of(word, prompt) for word in NAMES + WORDS}
    decoder = model.language_model.requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    rng, last_loss = Random("texts"), float("nan")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP, (1.0 - step / steps) / FINAL_SHARE)
        # short texts first: they have few other words that could be copied by mistake
        max_items = MIN_ITEMS + round((MAX_ITEMS - MIN_ITEMS) * min(1.0, 2 * step / steps))
        texts = [draw_text(rng, max_items) for _ in range(BATCH)]
        loss = _text_loss(model, texts, ids, prompt.id_of(CHUNK))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        last_loss = float(loss.detach())
        if step % 100 == 0:
            log.info("text: step %d, loss %.3f", step, last_loss)
    decoder.requires_grad_(False)
    return last_loss


def _text_loss(model: Flamingo, texts: Sequence[list[tuple[str, str, bool]]], ids: dict[str, int], end: int) -> Tensor:
    token_ids = [[token for name, word, _ in text for token in (ids[name], ids[word], end)] for text in texts]
    is_target = [flag for text in texts for _, _, is_taught in text for flag in (False, is_taught, True)]
    batch = whole_sequences(token_ids, [[-1] * len(sequence) for sequence in token_ids])
    positions = torch.tensor(is_target).nonzero().squeeze(1)
    batch = replace(batch, media_slot=None, last_token=positions - 1)
    logits = model(batch, NO_CACHE, MediaPages.zeros(model.config, 0, torch.float32, "cpu"))
    return F.cross_entropy(logits, batch.token_ids[positions])


def token_of(word: str, tokenizer: PromptTokenizer) -> int:
    """Return the one token of a word of the language."""
    (token,) = tokenizer.encode_plain(f" {word}")
    return token
