"""Creates tests/goldens/openflamingo: tiny random OpenFlamingo models and their outputs by open-flamingo 2.0.1.

It runs in an environment of its own (openflamingo-requirements.txt) and imports nothing of this repository: the library
builds the models, so that an error of ours cannot affect the expected numbers. Weights are float16, to be small.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_flamingo import create_model_and_transforms
from open_flamingo.src.helpers import PerceiverResampler
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizerFast,
    MptConfig,
    MptForCausalLM,
    PreTrainedTokenizerFast,
)

CORPUS = ["Output: a red square on a blue field. Question: what is shown? Short answer: a small photo of a dog."] * 4
IMAGE_SIZES = {"tall.png": (40, 71), "wide.png": (90, 37), "square.png": (32, 32), "palette.png": (48, 50)}
NEW_TOKENS = 8
WIDTH, PATCH, SIZE = 16, 8, 32
MODEL_NAME = "tiny-clip"

TEXT, IMAGE, VIDEO, END = "text", "image", "video", "end_of_chunk"
Case = list[tuple[str, str]]
CASES: dict[str, Case] = {
    "text_only": [(TEXT, "Question: what is a dog?")],
    "text_before_image": [(TEXT, "A small photo. "), (IMAGE, "tall.png"), (TEXT, "Output:")],
    "two_in_a_row": [(IMAGE, "wide.png"), (IMAGE, "square.png"), (TEXT, "Output: the red")],
    "several_shots": [
        *[(IMAGE, "square.png"), (TEXT, "Output: a red square"), (END, ""), (TEXT, "\n")],
        *[(IMAGE, "palette.png"), (TEXT, "Output: a blue field"), (END, ""), (TEXT, "\n")],
        *[(IMAGE, "wide.png"), (TEXT, "Output:")],
    ],
    "not_square": [(IMAGE, "wide.png"), (TEXT, "Question: what is shown? Short answer:")],
}
# for a resampler with frame embeddings; a video's value is its frames
VIDEO_CASE: Case = [(TEXT, "what is shown? "), (VIDEO, "tall.png wide.png square.png"), (TEXT, "Output:")]


@dataclass(frozen=True)
class Golden:
    """A model: its language model, and the variant of the released checkpoints that its file follows."""

    make_language_model: Callable[[int], nn.Module]
    make_tokenizer: Callable[[], PreTrainedTokenizerFast]
    every_n_layers: int
    seed: int
    nested: bool = False
    full: bool = False
    safetensors: bool = True
    small_resampler: bool = False
    num_frames: int | None = None


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer like LLaMA's: a space before every text, bytes for unknown characters, and <s> first."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"adeghilnoqrstuw", "▁a", "re", "▁re"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("r", "e"), ("▁", "re")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return LlamaTokenizerFast(tokenizer_object=tokenizer)


def gpt_neox(vocab_size: int) -> nn.Module:
    settings: dict[str, Any] = {
        "vocab_size": vocab_size + 12,  # like the released models: more rows than the tokenizer has tokens
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "rotary_pct": 0.5,
        "use_parallel_residual": False,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    return GPTNeoXForCausalLM(GPTNeoXConfig(**settings))


def mpt(vocab_size: int) -> nn.Module:
    config = MptConfig(d_model=32, n_heads=4, n_layers=4, expansion_ratio=2, max_seq_len=128, vocab_size=vocab_size)
    return MptForCausalLM(config)


def llama(vocab_size: int) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
        )
    )


GOLDENS = {
    "gpt_neox": Golden(gpt_neox, byte_level_tokenizer, every_n_layers=2, seed=1),
    "mpt": Golden(
        mpt,
        byte_level_tokenizer,
        every_n_layers=2,
        seed=2,
        nested=True,
        safetensors=False,
        small_resampler=True,
        num_frames=4,
    ),
    "llama": Golden(llama, llama_tokenizer, every_n_layers=1, seed=3, full=True, small_resampler=True),
}


@torch.no_grad()
def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw weights that are large enough for every part to affect the logits, and exact in float16."""
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("_gate"):
            value = 0.8 + 0.2 * noise
        elif parameter.ndim == 1 and name.endswith("weight"):
            value = 1 + 0.1 * noise
        elif parameter.ndim < 2:
            value = 0.1 * noise
        else:
            value = noise * 1.2 / parameter[0].numel() ** 0.5
        parameter.copy_(value.half().float())


def make_images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for name, (width, height) in IMAGE_SIZES.items():
        image = Image.new("RGB", (width, height), tuple(int(c) for c in random.integers(0, 256, 3)))
        draw = ImageDraw.Draw(image)
        for _ in range(4):
            x, y = int(random.integers(0, width)), int(random.integers(0, height))
            draw.ellipse([x - 15, y - 10, x + 15, y + 10], fill=tuple(int(c) for c in random.integers(0, 256, 3)))
        # a palette image is resized in its own mode and converted afterwards, so the order of steps matters
        (image.quantize(16) if name == "palette.png" else image).save(folder / name)


def make_open_clip(folder: Path, generator: torch.Generator) -> None:
    """Create an open_clip folder as on the hub; the text tower is minimal, since it is never used."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "embed_dim": 8,
        "quick_gelu": True,
        "vision_cfg": {"image_size": SIZE, "layers": 2, "width": WIDTH, "head_width": 8, "patch_size": PATCH},
        "text_cfg": {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1},
    }
    (folder / f"{MODEL_NAME}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    (folder / f"{MODEL_NAME}.json").unlink()
    model = open_clip.create_model(MODEL_NAME)
    randomise(model, generator)
    preprocess = {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)}
    written = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(written, indent=2) + "\n")
    torch.save({name: t.half() for name, t in model.state_dict().items()}, folder / "open_clip_pytorch_model.bin")


def make_clip(folder: Path, open_clip_folder: Path) -> None:
    """Create the same tower with the names of transformers."""
    state = torch.load(open_clip_folder / "open_clip_pytorch_model.bin", weights_only=True)
    source = {n.removeprefix("visual."): t.float() for n, t in state.items() if n.startswith("visual.")}
    target: dict[str, Tensor] = {
        "embeddings.class_embedding": source["class_embedding"],
        "embeddings.patch_embedding.weight": source["conv1.weight"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
        "embeddings.position_ids": torch.arange(1 + (SIZE // PATCH) ** 2)[None],
    }
    for ours, theirs in {"pre_layrnorm": "ln_pre", "post_layernorm": "ln_post"}.items():
        for kind in ("weight", "bias"):
            target[f"{ours}.{kind}"] = source[f"{theirs}.{kind}"]
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    parts["self_attn.out_proj"] = "attn.out_proj"
    for layer in range(2):
        for kind in ("weight", "bias"):
            for ours, theirs in parts.items():
                name = f"transformer.resblocks.{layer}.{theirs}.{kind}"
                target[f"encoder.layers.{layer}.{ours}.{kind}"] = source[name]
            fused = source[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"].chunk(3)
            for ours, tensor in zip(("q_proj", "k_proj", "v_proj"), fused, strict=True):
                target[f"encoder.layers.{layer}.self_attn.{ours}.{kind}"] = tensor
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=WIDTH // 8,
        image_size=SIZE,
        patch_size=PATCH,
        hidden_act="quick_gelu",
    )
    model: Any = CLIPVisionModel(config)
    model.vision_model.load_state_dict(target, strict=False)
    model.half().save_pretrained(folder)


def checkpoint_tensors(model: nn.Module, full: bool) -> dict[str, Tensor]:
    """Return the tensors that open_flamingo.train saves (trained parameters and all named "embed"), or all if `full`."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad or "embed" in name}
    duplicates = ("lang_encoder.old_decoder_blocks", "lang_encoder.gated_cross_attn_layers", "vision_encoder")
    halves: dict[int, Tensor] = {}
    selected = {}
    for name, tensor in model.state_dict().items():
        if full or (name in trained and not name.startswith(duplicates)):
            selected[name] = halves.setdefault(tensor.data_ptr(), tensor.half())
    return selected


def prompt_text(case: Case) -> str:
    return "".join({TEXT: value, END: "<|endofchunk|>"}.get(kind, "<image>") for kind, value in case)


@torch.no_grad()
def expect(model: Any, processor: Any, tokenizer: Any, case: Case, images: Path) -> tuple[Tensor, dict[str, Any]]:
    """Return the library's log-probabilities at all positions of a prompt, and its greedy tokens after it."""
    encoded = tokenizer(prompt_text(case), return_tensors="pt")
    media = [value.split() for kind, value in case if kind in (IMAGE, VIDEO)]
    frames = [torch.stack([processor(Image.open(images / name)) for name in names]) for names in media]
    vision = torch.stack(frames or [torch.zeros(1, 3, SIZE, SIZE)])[None]  # [1, M, F, 3, h, w]
    inputs = {"vision_x": vision, "lang_x": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    logits = model(**inputs).logits[0]
    if frames:
        without_images = model(**{**inputs, "vision_x": torch.zeros_like(vision)}).logits[0]
        assert float((logits - without_images).abs().max()) > 0.1, "the image makes no difference"
    # servers never sample these tokens; the library would
    suppressed = tokenizer.convert_tokens_to_ids(["<image>", "<PAD>"])
    options = {"max_new_tokens": NEW_TOKENS, "num_beams": 1, "do_sample": False, "pad_token_id": suppressed[1]}
    output = model.generate(**inputs, suppress_tokens=suppressed, **options)[0]
    length = encoded["input_ids"].shape[1]
    expected = {"segments": case, "token_ids": encoded["input_ids"][0].tolist(), "greedy": output[length:].tolist()}
    check_margins(model, inputs, output, length, suppressed)
    return logits.log_softmax(-1), expected


def check_margins(model: Any, inputs: dict[str, Tensor], output: Tensor, length: int, suppressed: list[int]) -> None:
    """Check that no greedy choice could change by rounding."""
    whole = {**inputs, "lang_x": output[None], "attention_mask": torch.ones_like(output)[None]}
    logits = model(**whole).logits[0, length - 1 : -1]
    logits[:, suppressed] = -torch.inf
    best = logits.topk(2).values
    assert float((best[:, 0] - best[:, 1]).min()) > 1e-3, "two tokens are almost equally likely: choose another seed"
    assert torch.equal(logits.argmax(-1), output[length:]), "the library's cached and uncached logits disagree"


def make_golden(folder: Path, name: str, golden: Golden) -> None:
    generator = torch.Generator().manual_seed(golden.seed)
    target, lm_folder = folder / name, folder / name / "language_model"
    tokenizer = golden.make_tokenizer()
    tokenizer.save_pretrained(lm_folder)
    language_model: Any = golden.make_language_model(len(tokenizer))
    randomise(language_model, generator)
    language_model.half().save_pretrained(lm_folder, safe_serialization=golden.safetensors, max_shard_size="40KB")
    model, processor, tokenizer = create_model_and_transforms(
        MODEL_NAME,
        str(folder / "open_clip" / "open_clip_pytorch_model.bin"),
        str(lm_folder),
        str(lm_folder),
        cross_attn_every_n_layers=golden.every_n_layers,
        use_local_files=True,
    )
    if golden.small_resampler:
        model.perceiver = PerceiverResampler(
            dim=WIDTH, depth=2, heads=2, num_latents=6, max_num_frames=golden.num_frames
        )
    randomise(model.perceiver, generator)
    randomise(model.lang_encoder.gated_cross_attn_layers, generator)
    # the library drew the rows that resizing added in float32
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    tensors = checkpoint_tensors(model, golden.full)
    if golden.nested:
        torch.save(
            {"epoch": 0, "model_state_dict": {f"module.{n}": t for n, t in tensors.items()}}, target / "checkpoint.pt"
        )
    else:
        torch.save(tensors, target / "checkpoint.pt")
    write_expected(target, model.eval(), processor, tokenizer, folder / "images")


def allow_videos(model: Any) -> None:
    """Replace `_encode_vision_x` by one without the assertion that a video has one frame; the resampler accepts any."""

    def encode(vision_x: Tensor) -> None:
        features = model.vision_encoder(vision_x.flatten(0, 2))[1].unflatten(0, vision_x.shape[:3])
        for layer in model.lang_encoder._get_decoder_layers():
            layer.condition_vis_x(model.perceiver(features))

    model._encode_vision_x = encode


def write_expected(target: Path, model: Any, processor: Any, tokenizer: Any, images: Path) -> None:
    results = {name: expect(model, processor, tokenizer, case, images) for name, case in CASES.items()}
    if model.perceiver.frame_embs is not None:
        allow_videos(model)
        results["video"] = expect(model, processor, tokenizer, VIDEO_CASE, images)
    save_file(
        {name: log_probs.contiguous() for name, (log_probs, _) in results.items()}, target / "expected.safetensors"
    )
    cases = {name: expected for name, (_, expected) in results.items()}
    (target / "expected.json").write_text(json.dumps(cases, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "openflamingo")
    folder = parser.parse_args().out
    make_images(folder / "images")
    make_open_clip(folder / "open_clip", torch.Generator().manual_seed(0))
    make_clip(folder / "clip", folder / "open_clip")
    for name, golden in GOLDENS.items():
        torch.manual_seed(golden.seed)
        make_golden(folder, name, golden)


if __name__ == "__main__":
    main()
