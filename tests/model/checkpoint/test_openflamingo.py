"""Log-probabilities and greedy tokens equal OpenFlamingo's, which tests/goldens/make_openflamingo.py stored.

Every golden goes through the command and comes back from the folder that it wrote.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from model.checkpoint.__main__ import main
from model.checkpoint.files import open_folder
from model.config import VisionConfig, load_config
from model.flamingo import Flamingo
from model.folder import load_folder
from model.media import MediaLimits, load_image, resize
from model.prompt import EncodedPrompt, EndOfChunk, Media, PromptTokenizer, Segment, Text, encode
from model.reference import encode as encode_media
from model.reference import generate, log_probs
from model.vision import normalise

GOLDENS = Path(__file__).parents[2] / "goldens" / "openflamingo"
EVERY_N_LAYERS = {"gpt_neox": 2, "mpt": 2, "llama": 1}
# of MPT's resampler alone there are frame embeddings
PROMPTS = ["text_only", "text_before_image", "two_in_a_row", "several_shots", "not_square", "video"]
CASES = [(name, case) for name in EVERY_N_LAYERS for case in PROMPTS if case != "video" or name == "mpt"]
TOLERANCE = 1e-4


def arguments(name: str, out: Path, **changes: Path | int) -> list[str]:
    options: dict[str, Path | int] = {
        "checkpoint": GOLDENS / name / "checkpoint.pt",
        "language_model": GOLDENS / name / "language_model",
        "vision_model": GOLDENS / "open_clip",
        "cross_attn_every_n_layers": EVERY_N_LAYERS[name],
        "out": out,
        **changes,
    }
    flags = [word for flag, value in options.items() for word in (f"--{flag.replace('_', '-')}", str(value))]
    return ["import", "openflamingo", *flags]


@dataclass(frozen=True)
class Imported:
    """The loaded model folder of a golden, and the library's results for the prompts."""

    model: Flamingo
    tokenizer: PromptTokenizer
    cases: dict[str, Any]
    log_probs: dict[str, Tensor]

    @classmethod
    def of(cls, name: str, folder: Path) -> Imported:
        config = load_config(folder)
        return cls(
            load_folder(folder, "cpu", torch.float32),
            PromptTokenizer.load(folder, config.prompt),
            json.loads((GOLDENS / name / "expected.json").read_text()),
            load_file(GOLDENS / name / "expected.safetensors"),
        )

    def prompt(self, case: str) -> EncodedPrompt:
        return encode([segment(*pair) for pair in self.cases[case]["segments"]], self.tokenizer)

    def pixels(self, case: str) -> list[Tensor]:
        return [
            pixels(value.split(), self.model.config.vision)
            for kind, value in self.cases[case]["segments"]
            if kind in ("image", "video")
        ]


def segment(kind: str, value: str) -> Segment:
    kinds: dict[str, Segment] = {"text": Text(value), "end_of_chunk": EndOfChunk()}
    return kinds.get(kind, Media(value.encode()))


def pixels(names: list[str], config: VisionConfig) -> Tensor:
    images = [load_image((GOLDENS / "images" / name).read_bytes(), MediaLimits()) for name in names]
    return normalise(torch.stack([torch.from_numpy(resize(image, config).copy()) for image in images]), config)


def wrap(state: dict[str, Tensor]) -> dict[str, Any]:
    """Wrap a checkpoint as a training run saves it."""
    return {"epoch": 3, "optimizer_state_dict": {}, "model_state_dict": {f"module.{n}": t for n, t in state.items()}}


def unwrap(saved: dict[str, Any]) -> dict[str, Tensor]:
    state = saved.get("model_state_dict", saved)
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def read(name: str) -> dict[str, Tensor]:
    return unwrap(torch.load(GOLDENS / name / "checkpoint.pt", weights_only=True))


@pytest.fixture(scope="module")
def goldens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Imported]:
    folder = tmp_path_factory.mktemp("imported")
    assert [main(arguments(name, folder / name)) for name in EVERY_N_LAYERS] == [0, 0, 0]
    return {name: Imported.of(name, folder / name) for name in EVERY_N_LAYERS}


@pytest.mark.parametrize(("name", "case"), CASES)
def test_log_probabilities_and_greedy_tokens_equal_the_library(
    goldens: dict[str, Imported], name: str, case: str
) -> None:
    imported = goldens[name]
    prompt, frames = imported.prompt(case), imported.pixels(case)
    assert prompt.token_ids == imported.cases[case]["token_ids"]
    ours = log_probs(imported.model, prompt.token_ids, prompt.media_index, encode_media(imported.model, frames))
    assert float((ours - imported.log_probs[case]).abs().max()) <= TOLERANCE
    expected = imported.cases[case]["greedy"]
    answer = generate(
        imported.model,
        prompt.token_ids,
        prompt.media_index,
        frames,
        max_tokens=len(expected),
        suppressed_ids=imported.tokenizer.suppressed_ids,
    )
    assert answer.token_ids == expected


@pytest.mark.parametrize("name", ["gpt_neox", "mpt"])
@pytest.mark.parametrize("rewrap", [wrap, dict], ids=["nested", "flat"])
def test_every_form_of_the_same_checkpoint_gives_the_same_model(name: str, rewrap: Any, tmp_path: Path) -> None:
    torch.save(rewrap(read(name)), tmp_path / "checkpoint.pt")
    assert main(arguments(name, tmp_path / "stored")) == 0
    again = arguments(name, tmp_path / "again", checkpoint=tmp_path / "checkpoint.pt", vision_model=GOLDENS / "clip")
    assert main(again) == 0
    stored, converted = (load_file(tmp_path / folder / "model.safetensors") for folder in ("stored", "again"))
    assert stored.keys() == converted.keys()
    assert all(torch.equal(tensor, converted[tensor_name]) for tensor_name, tensor in stored.items())
    assert load_config(tmp_path / "stored").vision == load_config(tmp_path / "again").vision


def test_the_configuration_follows_from_the_shapes(tmp_path: Path) -> None:
    for name in ("gpt_neox", "mpt"):
        assert main(arguments(name, tmp_path / name)) == 0
    large, small = load_config(tmp_path / "gpt_neox"), load_config(tmp_path / "mpt")
    assert (large.resampler.num_layers, large.resampler.num_heads, large.resampler.num_latents) == (6, 8, 64)
    assert (small.resampler.num_layers, small.resampler.num_heads, small.resampler.num_latents) == (2, 2, 6)
    assert {config.gated.head_dim for config in (large, small)} == {64}
    assert large.gated_layers == (1,)
    assert small.gated_layers == (1, 3)


@pytest.mark.parametrize(
    ("name", "begin", "eos"),
    [("gpt_neox", "", "<|endoftext|>"), ("llama", "<s>", "</s>")],
)
def test_the_lineages_tokens_are_appended_in_its_order(name: str, begin: str, eos: str, tmp_path: Path) -> None:
    assert main(arguments(name, tmp_path / "out")) == 0
    config, tokenizer = load_config(tmp_path / "out"), Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    base = Tokenizer.from_file(str(GOLDENS / name / "language_model" / "tokenizer.json")).get_vocab_size()
    new = ["<|endofchunk|>", "<image>", "<PAD>"]
    assert [tokenizer.token_to_id(token) for token in new] == [base, base + 1, base + 2]
    assert (config.language_model.vocab_size, config.language_model.num_new_tokens) == (base, 3)
    assert config.prompt.begin == begin
    assert config.prompt.eos == ("<|endofchunk|>", eos)
    assert config.prompt.suppressed == ("<image>", "<PAD>")


def test_a_tokenizer_that_can_pad_gets_no_second_padding_token(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDENS / "mpt" / "language_model", tmp_path / "lm")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<|endoftext|>"}))
    state = read("mpt")
    state["lang_encoder.transformer.wte.weight"] = state["lang_encoder.transformer.wte.weight"][:-1].clone()
    torch.save(state, tmp_path / "checkpoint.pt")
    out = tmp_path / "out"
    assert main(arguments("mpt", out, language_model=folder, checkpoint=tmp_path / "checkpoint.pt")) == 0
    assert load_config(out).language_model.num_new_tokens == 2
    # the end of text is an answer, though it pads too
    assert load_config(out).prompt.suppressed == ("<image>",)


def test_every_stored_case_is_compared(goldens: dict[str, Imported]) -> None:
    assert sorted(CASES) == sorted((name, case) for name, imported in goldens.items() for case in imported.cases)


def test_frame_embeddings_are_converted(tmp_path: Path) -> None:
    frames = torch.randn(8, 16)
    torch.save({**read("gpt_neox"), "perceiver.frame_embs": frames}, tmp_path / "checkpoint.pt")
    assert main(arguments("gpt_neox", tmp_path / "out", checkpoint=tmp_path / "checkpoint.pt")) == 0
    assert load_config(tmp_path / "out").resampler.num_frames == 8
    model = load_folder(tmp_path / "out", "cpu", torch.float32)
    assert torch.equal(model.state_dict()["resampler.frame_embeddings"], frames)


def test_frozen_weights_of_the_checkpoint_take_precedence(tmp_path: Path) -> None:
    state = read("llama")
    lm = "lang_encoder.model.layers.0.decoder_layer.mlp.down_proj.weight"
    changed = {
        lm: "language_model.layers.0.feed_forward.down.weight",
        "vision_encoder.conv1.weight": "vision.encoder.patch_embed.proj.weight",
    }
    state |= {name: state[name] + 1 for name in changed}
    torch.save(state, tmp_path / "checkpoint.pt")
    out = tmp_path / "out"
    changes = {"checkpoint": tmp_path / "checkpoint.pt", "vision_model": GOLDENS / "clip"}
    assert main(arguments("llama", out, **changes)) == 0
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(written[ours], state[theirs]) for theirs, ours in changed.items())


def test_missing_rows_come_from_the_language_model(tmp_path: Path) -> None:
    state = read("gpt_neox")
    names = {"embed_out.weight": "head", "gpt_neox.embed_in.weight": "embed"}
    torch.save({n: t for n, t in state.items() if n.removeprefix("lang_encoder.") not in names}, tmp_path / "x.pt")
    assert main(arguments("gpt_neox", tmp_path / "out", checkpoint=tmp_path / "x.pt")) == 0
    written, tables = (
        load_file(tmp_path / "out" / "model.safetensors"),
        open_folder(GOLDENS / "gpt_neox" / "language_model"),
    )
    for theirs, ours in names.items():
        whole = torch.cat([written[f"language_model.{ours}.weight"], written[f"language_model.{ours}.new_rows"]])
        assert torch.equal(whole, tables[theirs][: len(whole)])


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "model.checkpoint", *arguments("mpt", tmp_path / "out")]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "mpt of 4 layers x 32, gated layers before 1, 3, 283 tokens" in done.stdout


def test_dtype_casts_what_is_written(tmp_path: Path) -> None:
    assert main([*arguments("mpt", tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


GATE = "lang_encoder.transformer.blocks.1.gated_cross_attn_layer.attn_gate"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({GATE: None}, f"missing (1): {GATE}"),
        ({"perceiver.extra": torch.zeros(1)}, "unexpected (1): perceiver.extra"),
        ({"stray": torch.zeros(1)}, "unexpected (1): stray"),
        ({GATE: torch.zeros(2)}, f"misshapen (1): {GATE}: found [2], expected [1]"),
        ({"lang_encoder.transformer.wte.weight": torch.zeros(5, 32)}, "has 5 rows for 283 tokens"),
        ({"lang_encoder.transformer.blocks.1.decoder_layer.x": torch.zeros(1)}, "transformer.blocks.1.x"),
        ({"perceiver.media_time_embs": torch.zeros(4, 1, 16)}, "perceiver.media_time_embs"),
        ({"perceiver.latents": None}, "has no tensor perceiver.latents"),
        ({"perceiver.layers.0.0.to_q.weight": torch.zeros(100, 16)}, "100 rows, not a multiple of 64"),
        ({"lang_encoder.transformer.wte.weight": None}, "has no lang_encoder.transformer.wte.weight, and that of"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    changes: dict[str, Tensor | None], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {name: tensor for name, tensor in {**read("mpt"), **changes}.items() if tensor is not None}
    torch.save(state, tmp_path / "checkpoint.pt")
    assert main(arguments("mpt", tmp_path / "out", checkpoint=tmp_path / "checkpoint.pt")) == 1
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("convert", "complaint"),
    [
        (lambda latents: latents.long(), "perceiver.latents is not a tensor of floating-point numbers"),
        (lambda latents: latents > 0, "perceiver.latents is not a tensor of floating-point numbers"),
        (lambda latents: latents.to(torch.complex64), "perceiver.latents is not a tensor of floating-point numbers"),
        (lambda latents: latents / 0, "resampler.latents has values that are infinite or no numbers"),
        (lambda latents: latents[:0], "resampler.num_latents is 0, must be positive"),
        (Tensor.to_sparse, "holds entries that are not tensors: perceiver.latents"),
        (lambda latents: latents.to("meta"), "holds entries that are not tensors: perceiver.latents"),
    ],
)
def test_latents_that_no_model_can_use_are_refused(
    convert: Callable[[Tensor], Tensor], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = read("mpt")
    torch.save({**state, "perceiver.latents": convert(state["perceiver.latents"])}, tmp_path / "checkpoint.pt")
    assert main(arguments("mpt", tmp_path / "out", checkpoint=tmp_path / "checkpoint.pt")) == 1
    assert complaint in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("values", [{1: torch.zeros(1)}, {"model_state_dict": None}, {"model_state_dict": [1]}])
def test_a_dictionary_of_other_things_is_refused(
    values: dict[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(values, tmp_path / "checkpoint.pt")
    assert main(arguments("mpt", tmp_path / "out", checkpoint=tmp_path / "checkpoint.pt")) == 1
    assert "tensors" in capsys.readouterr().err


def test_a_setting_that_the_model_folder_cannot_hold_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(GOLDENS / "llama" / "language_model", tmp_path / "lm")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": "yes"}))
    assert main(arguments("llama", tmp_path / "out", language_model=folder)) == 1
    assert "tied_head: expected bool, got 'yes'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_wrong_interval_is_refused_with_both_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments("mpt", tmp_path / "out", cross_attn_every_n_layers=4)) == 1
    error = capsys.readouterr().err
    assert "before layers [1, 3]" in error
    assert "with one every 4 layers they should be before [3]" in error


class Surprise:
    """An object that would write a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.file), "w")


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({**read("mpt"), "x": Surprise(tmp_path / "ran")}, tmp_path / "checkpoint.pt")
    assert main(arguments("mpt", tmp_path / "out", checkpoint=tmp_path / "checkpoint.pt")) == 1
    assert "cannot be read as tensors and plain data alone" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_untrained_output_rows_become_zeros(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = read("llama")
    base = len(state.pop("lang_encoder.lm_head.weight")) - 3
    torch.save(state, tmp_path / "checkpoint.pt")
    assert main(arguments("llama", tmp_path / "out", checkpoint=tmp_path / "checkpoint.pt")) == 0
    assert "3 new tokens have no output rows" in caplog.text
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert not written["language_model.head.new_rows"].any()
    assert len(written["language_model.head.weight"]) == base
