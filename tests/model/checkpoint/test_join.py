"""A joined model answers as its language model alone, bit for bit, whatever forms its experts' folders have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from model.batch import NO_CACHE, whole_sequences
from model.checkpoint.__main__ import main
from model.checkpoint.experts import open_language_expert
from model.checkpoint.language_models import FAMILIES
from model.checkpoint.vision_models import load_clip_folder
from model.config import FlamingoConfig, PromptConfig, VisionConfig, load_config
from model.flamingo import Flamingo
from model.folder import load_folder, load_vision_folder, save_folder, save_vision_folder
from model.hub import inputs
from model.language_model import LanguageModel
from model.prompt import EncodedPrompt, EndOfChunk, Media, PromptTokenizer, Segment, Text, encode
from model.reference import encode as encode_media
from model.reference import generate
from model.vision import VisionEncoder
from tests.model.checkpoint.test_language_models import (
    MOSAIC_CONFIG,
    MOSAIC_NAMES,
    ORACLES,
    VOCABULARY,
    normed_mpt,
    ours,
    randomise,
    written,
)
from tests.tiny_models import CONFIGS, KIN_CONFIG, byte_tokenizer, tiny_model

GOLDENS = Path(__file__).parents[2] / "goldens" / "openflamingo"
CLIP, LLAMA, NEOX = GOLDENS / "clip", GOLDENS / "llama" / "language_model", GOLDENS / "gpt_neox" / "language_model"
NEW_TOKENS = ("<|endofchunk|>", "<image>")
SIDE = 64
NETWORK = VisionConfig(
    architecture="test_nfnet",
    image_size=SIDE,
    feature_dim=192,
    num_patches=4,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    resize="pad",
)


def words(size: int = VOCABULARY) -> Tokenizer:
    """Return a tokenizer of words w0, w1, ..., and the end of text as its last token."""
    vocabulary = {f"w{i}": i for i in range(size - 1)} | {"</s>": size - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def mosaic_gpt() -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = written(normed_mpt(), MOSAIC_NAMES)
    del tensors["lm_head.weight"]
    return MOSAIC_CONFIG, tensors


def of_oracle(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    oracle = randomise(ORACLES[name]())
    return oracle.config.to_dict(), oracle.state_dict()


DECODERS: dict[str, Callable[[], tuple[dict[str, Any], dict[str, Tensor]]]] = {
    **{name: lambda name=name: of_oracle(name) for name in ORACLES},  # type: ignore[misc]
    "mosaic_gpt": mosaic_gpt,
}


def write_decoder(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Write a decoder as transformers does; its tables end before those of the tokenizer with new tokens."""
    settings, tensors = DECODERS[name]()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings, default=str))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    words().save(str(folder / "tokenizer.json"))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return settings, tensors


def join(out: Path, language_model: Path | str = LLAMA, vision_model: Path | str = CLIP, *options: str) -> Flamingo:
    """Run the command and load what it wrote."""
    experts = ["--language-model", str(language_model), "--vision-model", str(vision_model)]
    assert main(["join", *experts, "--out", str(out), *options]) == 0
    return load_folder(out, "cpu", torch.float32)


def encoded_prompt(folder: Path) -> EncodedPrompt:
    segments: list[Segment] = [
        Text("w3 w17"),
        Media(b"1"),
        Text("w42 w8 w8"),
        EndOfChunk(),
        Media(b"2"),
        Text("w1 w29"),
    ]
    return encode(segments, PromptTokenizer.load(folder, load_config(folder).prompt))


def pixels(model: Flamingo, seed: int) -> Tensor:
    side = model.config.vision.image_size
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def logits(model: Flamingo, prompt: EncodedPrompt, seed: int = 0) -> Tensor:  # -> [T, V + A]
    """Return the logits of a prompt whose images have the pixels of this seed and the following ones."""
    batch = whole_sequences([prompt.token_ids], [model.media_slots(prompt.media_index)])
    media = encode_media(model, [pixels(model, seed + i) for i in range(len(prompt.media))])
    return model(batch, NO_CACHE, media)


@torch.inference_mode()
def bare_logits(decoder: LanguageModel, rows: Tensor, token_ids: list[int]) -> Tensor:  # [V + A, D], [T] -> [T, V]
    """Return the logits of a decoder without bridge; `rows` has the embeddings of its tokens and of those that it lacks."""
    batch = whole_sequences([token_ids], [[-1] * len(token_ids)])
    x = rows[batch.token_ids]
    if decoder.positions is not None:
        x = x + decoder.positions(batch.positions + decoder.config.position_offset)
    context = decoder.step_context(batch, x.dtype)
    for layer in decoder.layers:
        x = layer(x, context, None)
    return decoder.logits(x)


def open_gates(model: Flamingo) -> Flamingo:
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(1.0)
    return model


def test_every_family_is_joined() -> None:
    assert {name.partition("-")[0] for name in DECODERS} == set(FAMILIES)


@pytest.mark.parametrize("name", DECODERS)
def test_with_images_in_the_prompt_logits_are_those_of_the_bare_decoder(name: str, tmp_path: Path) -> None:
    settings, tensors = write_decoder(tmp_path / "decoder", name)
    model, bare = join(tmp_path / "out", tmp_path / "decoder"), ours(settings, tensors)
    prompt = encoded_prompt(tmp_path / "out")
    assert prompt.media_index == [-1, -1, 0, 0, 0, 0, 0, 1, 1, 1]
    new_rows = model.state_dict()["language_model.embed.new_rows"]
    expected = bare_logits(bare, torch.cat([bare.embed.weight, new_rows]), prompt.token_ids)
    assert torch.equal(logits(model, prompt)[:, :VOCABULARY], expected)
    # only the gates hold the images back
    first, second = (logits(open_gates(model), prompt, seed) for seed in (0, 2))
    assert torch.equal(first[:2], second[:2])
    assert not torch.equal(first[2], second[2])


@pytest.mark.parametrize("name", ["llama", "mpt", "opt-untied-no-bias"])
def test_greedy_answers_are_those_of_the_bare_decoder(name: str, tmp_path: Path) -> None:
    settings, tensors = write_decoder(tmp_path / "decoder", name)
    model, bare = join(tmp_path / "out", tmp_path / "decoder"), ours(settings, tensors)
    tokenizer = PromptTokenizer.load(tmp_path / "out", model.config.prompt)
    token_ids = [3, 17, 42, 8]
    answer = generate(model, token_ids, [-1] * 4, [], max_tokens=8, suppressed_ids=tokenizer.suppressed_ids)
    for _ in range(8):
        token_ids.append(int(bare_logits(bare, bare.embed.weight, token_ids)[-1].argmax()))
    assert answer.token_ids == token_ids[4:]


@pytest.mark.parametrize("name", ["gpt_neox", "mpt", "llama"])
def test_new_tokens_follow_the_vocabulary_and_their_rows_are_its_mean(name: str, tmp_path: Path) -> None:
    """The tables of the folders are padded, sharded, in PyTorch's or safetensors' files."""
    folder = GOLDENS / name / "language_model"
    model = join(tmp_path / "out", folder)
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    config, tensors = model.config.language_model, model.state_dict()
    assert [tokenizer.token_to_id(token) for token in NEW_TOKENS] == [vocabulary, vocabulary + 1]
    assert (config.vocab_size, config.num_new_tokens, tokenizer.get_vocab_size()) == (vocabulary, 2, vocabulary + 2)
    for table in ("embed",) if config.tied_head else ("embed", "head"):
        frozen, new = (tensors[f"language_model.{table}.{part}"] for part in ("weight", "new_rows"))
        assert len(frozen) == vocabulary
        torch.testing.assert_close(new, frozen.mean(0).repeat(2, 1))


def test_tokens_without_rows_of_their_own_are_new(tmp_path: Path) -> None:
    write_decoder(tmp_path / "decoder", "llama")
    words(VOCABULARY + 1).save(str(tmp_path / "decoder" / "tokenizer.json"))
    config = join(tmp_path / "out", tmp_path / "decoder").config.language_model
    assert (config.vocab_size, config.num_new_tokens) == (VOCABULARY, 3)


@pytest.mark.parametrize(
    ("folder", "begin", "eos"), [(NEOX, "", "<|endoftext|>"), (LLAMA, "<s>", "</s>")], ids=["gpt_neox", "llama"]
)
def test_prompts_are_written_as_openflamingos(folder: Path, begin: str, eos: str, tmp_path: Path) -> None:
    assert join(tmp_path / "out", folder).config.prompt == PromptConfig(
        media_token="<image>",
        begin=begin,
        end_of_chunk="<|endofchunk|>",
        eos=("<|endofchunk|>", eos),
        suppressed=("<image>",),
    )


def write_model(folder: Path, config: FlamingoConfig) -> Flamingo:
    model = tiny_model(config)
    save_folder(folder, config, model.state_dict().items(), byte_tokenizer().to_str())
    return model


@pytest.mark.parametrize("family", ["openflamingo", "idefics", "flamingo"])
def test_the_decoder_of_a_model_folder_keeps_its_weights_and_markers(family: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", CONFIGS[family])  # type: ignore[index]
    joined = join(tmp_path / "out", tmp_path / "model")
    assert joined.config.language_model == model.config.language_model
    assert joined.config.prompt == model.config.prompt
    tensors, before = joined.state_dict(), model.state_dict()
    frozen = {n for n in before if n.startswith("language_model.") and not n.endswith("new_rows")}
    assert all(torch.equal(tensors[name], before[name]) for name in frozen)
    assert not torch.equal(tensors["language_model.embed.new_rows"], before["language_model.embed.new_rows"])


def test_a_model_folder_without_an_end_of_chunk_gets_one(tmp_path: Path) -> None:
    config = CONFIGS["idefics"]
    prompt = replace(config.prompt, end_of_chunk="", eos=("</s>",), media_open="</s>")
    config = replace(config, language_model=replace(config.language_model, num_new_tokens=1), prompt=prompt)
    tokenizer = Tokenizer(byte_tokenizer().model)
    tokenizer.add_special_tokens(["</s>", "<image>"])
    save_folder(tmp_path / "model", config, tiny_model(config).state_dict().items(), tokenizer.to_str())
    joined = join(tmp_path / "out", tmp_path / "model").config
    assert joined.prompt == replace(prompt, end_of_chunk="<|endofchunk|>", eos=("<|endofchunk|>", "</s>"))
    assert joined.language_model.num_new_tokens == 2
    assert PromptTokenizer.load(tmp_path / "out", joined.prompt).id_of("<|endofchunk|>") == 258


def clip(folder: Path) -> tuple[Path, Callable[[Tensor], Tensor]]:
    return CLIP, clip_features(CLIP)


def open_clip(folder: Path) -> tuple[Path, Callable[[Tensor], Tensor]]:
    return GOLDENS / "open_clip", clip_features(GOLDENS / "open_clip")


def clip_features(folder: Path) -> VisionEncoder:
    config, tensors = load_clip_folder(folder)
    with torch.device("meta"):
        encoder = VisionEncoder(config)
    encoder.load_state_dict(tensors, assign=True)
    return encoder.float()


def timm_network(folder: Path) -> tuple[Path, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    network: Any = timm.create_model("test_resnet", num_classes=5).eval()
    timm.models.save_for_hf(network, str(folder), safe_serialization=True)
    return folder, lambda pixels: network.forward_features(pixels).flatten(2).transpose(1, 2)


def contrastive(folder: Path) -> tuple[Path, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    save_vision_folder(folder, NETWORK, VisionEncoder(NETWORK).state_dict())
    return folder, load_vision_folder(folder)


def model_folder(folder: Path) -> tuple[Path, Callable[[Tensor], Tensor]]:
    return folder, write_model(folder, CONFIGS["flamingo"]).vision


def model_folder_with_kin(folder: Path) -> tuple[Path, Callable[[Tensor], Tensor]]:
    return folder, write_model(folder, KIN_CONFIG).vision


FORMS = [clip, open_clip, timm_network, contrastive, model_folder, model_folder_with_kin]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@torch.inference_mode()
def test_every_form_of_encoder_keeps_its_features(
    form: Callable[[Path], tuple[Path, Callable[[Tensor], Tensor]]], tmp_path: Path
) -> None:
    folder, expected = form(tmp_path / "encoder")
    model = join(tmp_path / "out", LLAMA, folder)
    image = pixels(model, 0)
    features = model.vision(image)
    assert features.shape == (1, model.config.vision.num_patches, model.config.vision.width)
    torch.testing.assert_close(features, expected(image), atol=1e-5, rtol=1e-5)
    assert model.encode_media(image[None]).shape == (1, 64, model.config.vision.feature_dim)


def test_sizes_are_the_papers_unless_options_change_them(tmp_path: Path) -> None:
    config = join(tmp_path / "plain", GOLDENS / "mpt" / "language_model").config
    assert (config.family, config.name) == ("flamingo", "plain")
    assert (config.resampler.num_latents, config.resampler.num_layers, config.resampler.num_frames) == (64, 6, 8)
    assert (config.resampler.dim, config.resampler.input_projection) == (config.vision.feature_dim, False)
    assert (config.resampler.activation, config.gated.activation) == ("squared_relu", "squared_relu")
    assert (config.gated.num_heads, config.gated.head_dim, config.gated.ffn_dim) == (4, 8, 128)
    assert config.gated_layers == (0,)
    options = ("--cross-attn-every", "2", "--num-latents", "8", "--resampler-layers", "2", "--resampler-dim", "128")
    changed = join(tmp_path / "changed", GOLDENS / "mpt" / "language_model", CLIP, *options)
    resampler = changed.config.resampler
    assert (resampler.num_latents, resampler.num_layers, resampler.dim) == (8, 2, 128)
    assert (resampler.num_heads, resampler.input_projection) == (2, True)
    assert changed.config.gated_layers == (0, 2)
    assert changed.encode_media(pixels(changed, 0)[None]).shape == (1, 8, 128)


def test_the_default_models_experts_are_read_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model", CONFIGS["flamingo"])
    monkeypatch.setattr(inputs, "prepare_default", lambda: tmp_path / "model")
    joined = join(tmp_path / "out", "default", "default").config
    assert joined.language_model == CONFIGS["flamingo"].language_model
    assert joined.vision == CONFIGS["flamingo"].vision


def test_the_command_says_that_the_gates_are_closed_and_stores_where_the_experts_come_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    join(tmp_path / "out", NEOX, CLIP, "--cross-attn-every", "1")
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{tmp_path / 'out'}: flamingo model 'out', gpt_neox of 2 layers x 32, gated layers before 0, 1, " in line
    assert line.endswith("The gates are closed: images have no effect until it is trained")
    origin = json.loads((tmp_path / "out" / "SOURCE.json").read_text())
    parts = [(part["part"], part["repository"]) for part in origin["parts"]]
    assert parts == [("language model", "language_model"), ("vision model", "clip")]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    gates = [tensor for name, tensor in tensors.items() if name.endswith("_gate")]
    assert len(gates) == 4
    assert not any(gate.any() for gate in gates)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--cross-attn-every", "0"], "cross_attn_every is 0, must be positive"),
        (["--cross-attn-every", "3"], "cross_attn_every is 3, but the language model has 2 layers"),
        (["--num-latents", "0"], "num_latents is 0, must be positive"),
        (["--resampler-layers", "-1"], "resampler_layers is -1, must be positive"),
        (["--resampler-layers", "1001"], "resampler.num_layers is 1001, must be in 0..1000"),
        (["--resampler-dim", "0"], "resampler_dim is 0, must be positive"),
        (["--vision-model", str(LLAMA)], "the vision model's model_type 'llama' is neither 'clip' nor"),
        (["--language-model", str(CLIP)], "has no tokenizer.json"),
        (["--language-model", "nowhere"], "nowhere is neither a folder nor the name of a repository"),
        (["--out", str(CLIP / "config.json" / "out")], "File exists"),
        (["--out", str(CLIP)], "already exists and is not an empty folder"),
    ],
    ids=lambda value: " ".join(value[:2])[:30] if isinstance(value, list) else "",
)
def test_options_that_cannot_work_give_one_line(
    options: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = ["--language-model", str(LLAMA), "--vision-model", str(CLIP), "--out", str(tmp_path / "out")]
    assert main(["join", *experts, *options]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert complaint in line
    assert not (tmp_path / "out").exists()


def test_a_model_folder_with_a_missing_tensor_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CONFIGS["flamingo"]
    tensors = tiny_model(config).state_dict()
    del tensors["language_model.norm.weight"]
    save_folder(tmp_path / "model", config, tensors.items(), byte_tokenizer().to_str())
    experts = ["--language-model", str(tmp_path / "model"), "--vision-model", str(CLIP)]
    assert main(["join", *experts, "--out", str(tmp_path / "out")]) == 1
    assert "missing (1): language_model.norm.weight" in capsys.readouterr().err


def test_a_tokenizer_with_gaps_in_its_ids_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(LLAMA, tmp_path / "decoder")
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 3}, unk_token="a"))
    tokenizer.save(str(folder / "tokenizer.json"))
    experts = ["--language-model", str(folder), "--vision-model", str(CLIP)]
    assert main(["join", *experts, "--out", str(tmp_path / "out")]) == 1
    assert "must have different ids below the model's" in capsys.readouterr().err


def test_an_expert_has_no_rows_of_new_tokens() -> None:
    expert = open_language_expert(LLAMA)
    assert expert.config.num_new_tokens == len(NEW_TOKENS)
    assert not [name for name in expert.tensors if name.endswith("new_rows")]
