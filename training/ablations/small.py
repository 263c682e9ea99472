"""A small model for ablations that take minutes: the default model's encoder and a small decoder.

The decoder is first trained on text alone, and then frozen. The model's folder is built once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F

from model.batch import NO_CACHE, MediaPages, whole_sequences
from model.config import FlamingoConfig, VisionConfig
from model.flamingo import Flamingo
from model.folder import load_folder, save_folder
from model.prompt import PromptTokenizer
from model.zoo.bridge import start_bridge
from model.zoo.default import DEFAULT
from training.ablations.data import TEMPLATE, Kinds
from training.start import rebuild

log = logging.getLogger(__name__)
END, MEDIA, CHUNK = "<|endoftext|>", "<image>", "<|endofchunk|>"
VOCABULARY, DIM = 1024, 128
BATCH, LEARNING_RATE = 32, 2e-3


def small_config(vision: VisionConfig, vocab_size: int) -> FlamingoConfig:
    resampler = replace(DEFAULT.resampler, dim=64, num_layers=1, num_latents=8, num_heads=2, head_dim=32, ffn_dim=128)
    return replace(
        DEFAULT,
        name="flamboyance-ablated",
        vision=vision,
        resampler=replace(resampler, num_spatial=vision.num_patches),
        gated=replace(DEFAULT.gated, interval=1, num_heads=4, head_dim=32, ffn_dim=2 * DIM),
        language_model=replace(
            DEFAULT.language_model,
            vocab_size=vocab_size,
            dim=DIM,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            ffn_dim=3 * DIM,
            max_positions=512,
            rotary_dim=32,
            weights="float",
        ),
        prompt=replace(DEFAULT.prompt, eos=(CHUNK, END)),
    )


def build_small_model(folder: Path, experts: Path, kinds: Kinds, steps: int) -> None:
    """Build the small model in `folder`, with the encoder of the model folder `experts`, unless it exists already."""
    if (folder / "config.json").exists():
        return
    tokenizer = train_tokenizer(list(caption_texts(kinds, Random(0), 4000)))
    encoder = load_folder(experts, "cpu", torch.float32).vision
    torch.manual_seed(0)
    model = Flamingo(small_config(encoder.config, tokenizer.get_vocab_size() - 2)).requires_grad_(False)
    loss = pretrain(model, tokenizer, kinds, steps)
    log.info("the small language model's loss on text is %.3f after %d steps", loss, steps)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("language_model.")}
    tensors |= {f"vision.{name}": tensor for name, tensor in encoder.state_dict().items()}
    bridge = start_bridge(model.config, tensors)
    save_folder(
        folder, model.config, rebuild(model.config, {**tensors, **bridge}).state_dict().items(), tokenizer.to_str()
    )


def caption_texts(kinds: Kinds, rng: Random, count: int) -> Iterator[str]:
    """Yield the images' captions without the images."""
    records = kinds.catalogue.records
    for _ in range(count):
        name = rng.choice(kinds.names)
        label = records[rng.choice(kinds.training_rows[name])].label
        yield f"{TEMPLATE.prompt} {name}, {label}" if label and rng.random() < 0.5 else f"{TEMPLATE.prompt} {name}"


def train_tokenizer(corpus: list[str]) -> Tokenizer:
    """Train a byte-pair tokenizer; the end of text is the vocabulary's last token, and the bridge's two tokens follow."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (END, MEDIA, CHUNK)])
    return tokenizer


def pretrain(model: Flamingo, tokenizer: Tokenizer, kinds: Kinds, steps: int) -> float:
    """Train the decoder on the captions' next tokens, including ends of chunks, and return the last loss.

    The gates are closed, so the bridge has no effect.
    """
    prompt = PromptTokenizer(Tokenizer.from_str(tokenizer.to_str()), tokenizer, model.config.prompt)
    decoder = model.language_model.requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    rng, last_loss = Random("0/text"), float("nan")
    no_media = MediaPages.zeros(model.config, 0, torch.float32, "cpu")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 20) * (1.0 - step / steps)
        ids = [[*prompt.encode_plain(text), prompt.id_of(CHUNK)] for text in caption_texts(kinds, rng, BATCH)]
        batch = replace(whole_sequences(ids, [[-1] * len(sequence) for sequence in ids]), media_slot=None)
        logits = model(batch, NO_CACHE, no_media)
        targets = batch.token_ids.roll(-1)
        targets[batch.query_starts[1:].long() - 1] = -100  # nothing follows a sequence's last token
        loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last_loss = float(loss.detach())
    decoder.requires_grad_(False)
    return last_loss
