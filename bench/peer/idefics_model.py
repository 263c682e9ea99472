"""The peer: IDEFICS in transformers, with a checkpoint of random weights that transformers saves and our command imports.

`generate` is called as its documentation describes; a stopping criterion records the time of each token. Within a request
the peer keeps the vision encoder's features, and computes the resampler and the media keys and values again for each token.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from bench.driver import BenchFailed, Outcome, Trace
from bench.random_models import BEGIN, END, SIZES, Size, cache_folder, tokenizer
from bench.table import ROOT
from bench.workload import Prompt
from model.config import VisionConfig
from model.prompt import PromptTokenizer, encode
from model.vision import normalise

Inputs = dict[str, Tensor]

# the resampler's output for `generate`: [S, M, R, D] for S sequences of M images, later [S * M, R, D]
TAKES_IMAGES_BY_SEQUENCE = Version(transformers.__version__) < Version("5.24")


def checkpoint(name: str) -> tuple[Path, Path]:
    """Return the folders of the checkpoint of transformers and of the imported one, and build missing ones first."""
    peer_folder = cache_folder(f"idefics-{name}", asdict(SIZES[name]))
    imported_folder = peer_folder.with_name(f"{peer_folder.name}-imported")
    if not (peer_folder / "tokenizer.json").exists():
        _save(peer_folder, SIZES[name])
    if not (imported_folder / "config.json").exists():
        command = [sys.executable, "-m", "model.checkpoint", "import", "idefics", "--from", str(peer_folder)]
        subprocess.run([*command, "--out", str(imported_folder)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return peer_folder, imported_folder


def _save(folder: Path, size: Size) -> None:
    torch.manual_seed(0)
    IdeficsForVisionText2Text(_config(size)).save_pretrained(folder)
    # The tokenizer is saved last: its presence shows that the folder is complete.
    PreTrainedTokenizerFast(tokenizer_object=tokenizer(size), bos_token=BEGIN, eos_token=END).save_pretrained(folder)


def _config(size: Size) -> IdeficsConfig:
    return IdeficsConfig(
        vocab_size=size.vocab_size,
        additional_vocab_size=2,
        hidden_size=size.dim,
        intermediate_size=size.ffn_dim,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        cross_layer_interval=size.interval,
        alpha_initializer="ones",
        alpha_type="vector",
        qk_layer_norms=True,
        use_resampler=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        vision_config={
            "embed_dim": size.vision_dim,
            "image_size": size.image_size,
            "patch_size": size.patch_size,
            "num_hidden_layers": size.vision_layers,
            "num_attention_heads": size.vision_heads,
            "intermediate_size": 4 * size.vision_dim,
        },
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": size.num_latents,
            "resampler_depth": size.resampler_layers,
            "resampler_n_heads": size.vision_heads,
            "resampler_head_dim": size.resampler_head_dim,
            "qk_layer_norms_perceiver": True,
        },
    )


class Perceived(IdeficsForVisionText2Text):
    """IDEFICS that accepts precomputed perceiver embeddings for all tokens.

    After the first token, the library's `generate` would also pass them as the vision encoder's output, and reject both.
    """

    def _update_model_kwargs_for_generation(
        self,
        outputs: Any,
        model_kwargs: dict[str, Any],
        is_encoder_decoder: bool = False,
        num_new_tokens: int = 1,
        **options: Any,
    ) -> dict[str, Any]:
        updated = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens=num_new_tokens, **options
        )
        if updated.get("perceiver_embeddings") is not None:
            updated["image_hidden_states"] = None
        return updated


class Clock(StoppingCriteria):
    """A stopping criterion that never stops, and records the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Peer:
    """IDEFICS in transformers, loaded from a folder, in float32."""

    def __init__(self, folder: Path, tokenizer: PromptTokenizer, vision: VisionConfig) -> None:
        self.model = Perceived.from_pretrained(folder, dtype=torch.float32).eval()
        self._tokenizer = tokenizer
        self._vision = vision

    @property
    def num_parameters(self) -> int:
        module: nn.Module = self.model
        return sum(parameter.numel() for parameter in module.parameters())

    def inputs(self, prompts: Sequence[Prompt]) -> Inputs:
        """Return a batch of prompts, which must agree in length and number of images."""
        encoded = [encode(prompt.segments(), self._tokenizer) for prompt in prompts]
        if len({(len(e.token_ids), len(e.media)) for e in encoded}) > 1:
            raise BenchFailed("the prompts of a batch differ in length or number of images")
        index = torch.tensor([e.media_index for e in encoded])  # [S, T]
        return {
            "input_ids": torch.tensor([e.token_ids for e in encoded]),
            "attention_mask": torch.ones_like(index),
            "image_attention_mask": (index[..., None] == torch.arange(len(encoded[0].media))).long(),
            "pixel_values": torch.stack([self._pixels(prompt) for prompt in prompts]),
        }

    def _pixels(self, prompt: Prompt) -> Tensor:  # [M, 3, h, w]
        frames = torch.stack([torch.from_numpy(image.frames(self._vision)[0].copy()) for image in prompt.images()])
        return normalise(frames, self._vision)

    @torch.inference_mode()
    def perceive(self, inputs: Inputs) -> Inputs:
        """Return the same inputs with the resampler's output instead of pixels."""
        core = self.model.model
        features = core.vision_model(pixel_values=inputs["pixel_values"].flatten(0, 1)).last_hidden_state
        text = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
        embeddings = core.perceiver_resampler(features)  # [S * M, R, D]
        if TAKES_IMAGES_BY_SEQUENCE:
            embeddings = embeddings.unflatten(0, inputs["pixel_values"].shape[:2])
        return {**text, "perceiver_embeddings": embeddings}

    def run(self, inputs: Inputs, max_tokens: int) -> Outcome:
        """Generate exactly `max_tokens` greedy tokens for each sequence of the batch."""
        clock, length = Clock(), inputs["input_ids"].shape[1]
        began = time.perf_counter()
        answer = self.model.generate(
            **inputs,
            generation_config=GenerationConfig(
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=1,
                suppress_tokens=list(self._tokenizer.suppressed_ids),
            ),
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        seconds = time.perf_counter() - began
        return Outcome(tuple(Trace(began, ids, clock.times) for ids in answer[:, length:].tolist()), seconds)
