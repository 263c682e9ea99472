"""Tiny random IDEFICS models, saved by transformers and imported by the command, compute the same as ours.

Both sides start from the same list of texts and pictures: IdeficsProcessor makes the library's inputs, ours makes ours.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessorPil,
    IdeficsProcessor,
    PreTrainedTokenizerFast,
)

from model.checkpoint.__main__ import main
from model.config import load_config
from model.flamingo import Flamingo
from model.folder import load_folder
from model.media import resize
from model.prompt import EncodedPrompt, Media, PromptTokenizer, Text, encode
from model.reference import encode as encode_media
from model.reference import generate, log_probs
from model.vision import normalise

TOLERANCE = 1e-4
NEW_TOKENS = 6
GOLDENS = Path(__file__).parents[2] / "goldens" / "openflamingo"
# LLaMA's kind of vocabulary
TOKENIZER = GOLDENS / "llama" / "language_model" / "tokenizer.json"
MARKERS = ["<fake_token_around_image>", "<image>"]
END_OF_UTTERANCE = "<end_of_utterance>"
SIZE = 32


def png(name: str) -> Image.Image:
    return Image.open(GOLDENS / "images" / f"{name}.png").convert("RGB")


TALL, WIDE, SQUARE = png("tall"), png("wide"), png("square")
Prompt = Sequence[str | Image.Image]
PROMPTS: dict[str, Prompt] = {
    "text_only": ["what is a dog?"],
    "text_before_image": ["a small photo. ", TALL, " Output:"],
    "two_in_a_row": [WIDE, TALL, "the red square"],
    "several_shots": ["User:", TALL, "a dog\n", SQUARE, "a red square\n", WIDE, "Output:"],
    "not_square": [WIDE, "what is shown?"],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as_released": {"qk_layer_norms": True, "alpha_type": "float"},
    "plain": {"qk_layer_norms": False, "alpha_type": "vector", "cross_layer_interval": 1, "perceiver_qk": False},
    "sparse": {"qk_layer_norms": True, "alpha_type": "vector", "cross_layer_interval": 3, "num_hidden_layers": 6},
    "one_table": {"qk_layer_norms": False, "alpha_type": "float", "additional_vocab_size": 0},
    "tied": {"qk_layer_norms": True, "alpha_type": "float", "tie_word_embeddings": True},
}


def make_processor(*, end_of_utterance: bool = False) -> Any:
    extra = [*MARKERS, END_OF_UTTERANCE] if end_of_utterance else MARKERS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(TOKENIZER)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        extra_special_tokens=extra,
    )
    return IdeficsProcessor(IdeficsImageProcessorPil(image_size=SIZE), tokenizer)


def make_model(num_tokens: int, *, perceiver_qk: bool = True, additional_vocab_size: int = 2, **settings: Any) -> Any:
    config = IdeficsConfig(
        vocab_size=num_tokens - additional_vocab_size,
        additional_vocab_size=additional_vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        use_resampler=True,
        **{"num_hidden_layers": 4, "cross_layer_interval": 2, **settings},
        vision_config={
            "embed_dim": 16,
            "image_size": SIZE,
            "intermediate_size": 40,
            "patch_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": 5,
            "resampler_depth": 2,
            "resampler_n_heads": 3,
            "resampler_head_dim": 8,
            "qk_layer_norms_perceiver": perceiver_qk,
        },
    )
    return randomised(IdeficsForVisionText2Text(config).eval())


@torch.no_grad()
def randomised(model: Any) -> Any:
    """Set weights so large that every part affects the logits, and open gates."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "alpha" in name:
            parameter.uniform_(0.5, 1.5)
        elif parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
        else:
            parameter.normal_(std=1.2 / parameter[0].numel() ** 0.5)
    return model


@dataclass(frozen=True)
class Pair:
    """The library's model and processor, and our model of the folder that they were saved to."""

    theirs: Any
    processor: Any
    ours: Flamingo
    tokenizer: PromptTokenizer

    @classmethod
    def of(cls, theirs: Any, processor: Any, folder: Path) -> Pair:
        theirs.save_pretrained(folder / "theirs")
        processor.save_pretrained(folder / "theirs")
        assert main(["import", "idefics", "--from", str(folder / "theirs"), "--out", str(folder / "ours")]) == 0
        config = load_config(folder / "ours")
        ours = load_folder(folder / "ours", "cpu", torch.float32)
        return cls(theirs, processor, ours, PromptTokenizer.load(folder / "ours", config.prompt))

    def prompt(self, parts: Prompt) -> EncodedPrompt:
        segments = [Text(part) if isinstance(part, str) else Media(bytes([i])) for i, part in enumerate(parts)]
        return encode(segments, self.tokenizer)

    def pixels(self, parts: Prompt) -> list[Tensor]:
        config = self.ours.config.vision
        frames = [torch.from_numpy(resize(part, config).copy()) for part in parts if not isinstance(part, str)]
        return [normalise(frame[None], config) for frame in frames]


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    processor = make_processor()
    model = make_model(len(processor.tokenizer), **VARIANTS[request.param])
    return Pair.of(model, processor, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("name", PROMPTS)
def test_log_probabilities_and_greedy_tokens_equal_the_library(pair: Pair, name: str) -> None:
    parts = PROMPTS[name]
    inputs = pair.processor(text=[list(parts)])
    prompt, pixels = pair.prompt(parts), pair.pixels(parts)
    assert prompt.token_ids == inputs["input_ids"][0].tolist()
    with torch.inference_mode():
        expected = pair.theirs(**inputs).logits[0].log_softmax(-1)
    ours = log_probs(pair.ours, prompt.token_ids, prompt.media_index, encode_media(pair.ours, pixels))
    assert float((ours - expected).abs().max()) <= TOLERANCE
    never = list(pair.tokenizer.suppressed_ids)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "suppress_tokens": never, "eos_token_id": None}
    continued = pair.theirs.generate(**inputs, **options)[0, len(prompt.token_ids) :]
    answer = generate(
        pair.ours, prompt.token_ids, prompt.media_index, pixels, max_tokens=NEW_TOKENS, suppressed_ids=never
    )
    assert answer.token_ids == continued.tolist()


def test_the_image_affects_the_compared_logits(pair: Pair) -> None:
    prompt = pair.prompt([TALL, "Output:"])
    tall, wide = (
        log_probs(pair.ours, prompt.token_ids, prompt.media_index, encode_media(pair.ours, pair.pixels([image])))
        for image in (TALL, WIDE)
    )
    assert float((tall - wide)[-1].abs().max()) > 100 * TOLERANCE


def test_utterances_end_with_the_tokenizers_end_of_utterance(tmp_path: Path) -> None:
    processor = make_processor(end_of_utterance=True)
    model = make_model(len(processor.tokenizer), additional_vocab_size=3, qk_layer_norms=True)
    pair = Pair.of(model, processor, tmp_path)
    parts: Prompt = ["User: ", TALL, "a dog", "User: the red", "a square"]
    inputs = processor(text=[list(parts)], add_end_of_utterance_token=True)
    assert pair.prompt(parts).token_ids == inputs["input_ids"][0].tolist()
    prompt = pair.ours.config.prompt
    assert prompt.end_of_chunk == prompt.text_separator == END_OF_UTTERANCE
    assert prompt.eos == ("</s>", END_OF_UTTERANCE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    processor = make_processor()
    make_model(len(processor.tokenizer), qk_layer_norms=True).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def source(saved: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may change."""
    return shutil.copytree(saved, tmp_path / "theirs")


def run(source: Path, out: Path) -> int:
    return main(["import", "idefics", "--from", str(source), "--out", str(out)])


def test_pytorch_files_in_shards_give_the_same_model(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "one") == 0
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, held in shards.items():
        # older releases saved this buffer, too
        buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
        torch.save({**buffers, **{name: tensors[name] for name in held}}, source / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert run(source, tmp_path / "other") == 0
    whole, sharded = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(tensor, sharded[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "idefics2"}, "is a 'idefics2' model, not 'idefics'"),
        ({"use_resampler": False}, "use_resampler is false"),
        ({"alpha_type": "matrix"}, "alpha_type is 'matrix'"),
        ({"additional_vocab_size": 1}, "the tokenizer has 280 tokens"),
        ({"additional_vocab_size": None}, "additional_vocab_size is None, must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0 is not implemented"),
        ({"num_attention_heads": None}, "it has no num_attention_heads"),
        ({"num_attention_heads": "2"}, "num_attention_heads = '2' is not implemented"),
        ({"cross_layer_interval": None}, "it has no cross_layer_interval"),
        ({"cross_layer_interval": 2.5}, "cross_layer_interval = 2.5 is not implemented"),
        ({"hidden_act": ["silu"]}, "activation ['silu'] is not one of"),
        ({"alpha_type": ["float"]}, "alpha_type is ['float']"),
        ({"vision_config": 5}, "vision_config is 5, must be an object"),
        ({"perceiver_config": {"resampler_n_latents": "8"}}, "perceiver_config.resampler_n_latents = '8' is not"),
        (
            {"vision_config": {"embed_dim": None, "image_size": 32}},
            "config.json: a setting has a wrong type or value: ",
        ),
        ({"rope_parameters": 2}, "the language model's config: a setting has a wrong type or value: argument of type"),
        ({"intermediate_size": 49}, "mlp.down_proj.weight: found [32, 48], expected [32, 49]"),
    ],
)
def test_unsupported_settings_are_refused_by_name(
    changes: dict[str, Any], complaint: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))
    assert run(source, tmp_path / "out") == 1
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"image_size": None, "size": 224}, "the image processor's size is 224, the vision model's is"),
        ({"image_size": None, "size": [32]}, "the image processor's size is [32], the vision model's is"),
        ({"image_mean": 0.5}, "the image settings: mean is 0.5, must be three numbers"),
        ({"image_std": [1, 2, "x"]}, "the image settings: std is [1, 2, 'x'], must be three numbers"),
        ({"image_std": [0, 0, 0]}, "vision.std is [0, 0, 0], must be positive and finite"),
    ],
)
def test_wrong_settings_of_images_are_refused_by_name(
    changes: dict[str, Any], complaint: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "preprocessor_config.json").write_text(json.dumps(changes))
    assert run(source, tmp_path / "out") == 1
    assert complaint in capsys.readouterr().err


def test_other_names_of_an_activation_are_known(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "hidden_act": "swish"}))
    assert run(source, tmp_path / "out") == 0
    assert load_config(tmp_path / "out").gated.activation == "silu"


LATENTS = "model.perceiver_resampler.latents"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({LATENTS: None}, f"missing (1): {LATENTS}"),
        ({"model.norm.weight": None}, "missing (1): model.norm.weight"),
        ({"stray": torch.zeros(1)}, "unexpected (1): stray"),
        ({"model.layers.0.stray": torch.zeros(1)}, "unexpected (1): model.layers.0.stray"),
        ({LATENTS: torch.zeros(4, 16)}, f"misshapen (1): {LATENTS}: found [4, 16], expected [5, 16]"),
        ({"lm_head.additional_fc.weight": None}, "missing (1): lm_head.additional_fc.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    changes: dict[str, Tensor | None],
    complaint: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors = {**load_file(source / "model.safetensors"), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, source / "model.safetensors")
    assert run(source, tmp_path / "out") == 1
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("file", ["processor_config.json", "preprocessor_config.json"])
def test_colours_come_from_the_image_processor(file: str, source: Path, tmp_path: Path) -> None:
    settings = json.loads((source / "processor_config.json").read_text())["image_processor"]
    settings |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    written = settings if file.startswith("pre") else {"image_processor": settings}
    (source / file).write_text(json.dumps(written))
    assert run(source, tmp_path / "out") == 0
    vision = load_config(tmp_path / "out").vision
    assert (vision.mean, vision.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_another_image_size_is_refused_with_both_sizes(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "preprocessor_config.json").write_text(json.dumps({"image_size": 48}))
    assert run(source, tmp_path / "out") == 1
    assert "size is 48, the vision model's is 32" in capsys.readouterr().err
