"""A preset is built at tiny scale with the structure of the full one, and is then trained and served like any model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.checkpoint.experts import LanguageExpert, VisionExpert
from model.config import FlamingoConfig, load_config
from model.flamingo import Flamingo
from model.folder import load_folder
from model.hub.job import read_origin
from model.presets.__main__ import main
from model.presets.build import preset_config
from model.presets.experts import byte_tokenizer
from model.presets.paper import PRESETS
from model.presets.scale import tiny
from model.prompt import PromptTokenizer
from tests.model.checkpoint import test_gguf as gguf
from tests.model.checkpoint.test_join import CLIP, LLAMA
from tests.server.conftest import image_part, png
from tests.server.test_main import running
from tests.training.toy import pairs
from training import __main__ as training
from training.data.make import write_shards

# what the tiny scale changes; everything else is structure
WIDTHS = {"name", "architecture", "feature_dim", "dim", "num_heads", "num_kv_heads", "head_dim", "ffn_dim"}
WIDTHS |= {"rotary_dim", "vocab_size"}


def build(out: Path, *options: str, preset: str = "flamingo-3b") -> Flamingo:
    assert main(["build", preset, "--scale", "tiny", "--out", str(out), *options]) == 0
    return load_folder(out, "cpu", torch.float32)


def flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= flat(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return out


@pytest.mark.parametrize("name", PRESETS)
def test_the_tiny_scale_changes_widths_and_nothing_else(name: str) -> None:
    full, small = (flat(dataclasses.asdict(config)) for config in (PRESETS[name], tiny(PRESETS[name])))
    changed = {path for path in full if full[path] != small[path]}
    assert {path.rpartition(".")[2] for path in changed} == WIDTHS
    for path in changed:
        assert path in ("name", "vision.architecture") or 0 < small[path] < full[path]
    assert tiny(PRESETS[name]).gated_layers == PRESETS[name].gated_layers


@pytest.mark.parametrize("name", PRESETS)
def test_a_built_folder_has_the_presets_configuration_and_loads(name: str, tmp_path: Path) -> None:
    model = build(tmp_path / "model", preset=name)
    assert model.config == dataclasses.replace(tiny(PRESETS[name]), name="model")
    assert all(not gate.any() for n, gate in model.named_parameters() if n.endswith("_gate"))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert not (tmp_path / "model" / "SOURCE.json").exists()


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_experts_of_the_presets_sizes_give_the_preset(preset: FlamingoConfig) -> None:
    """This holds at full scale, whose weights would not fit here."""
    tokenizer = byte_tokenizer(preset.language_model.vocab_size, ("<image>", "<EOC>"))
    text = LanguageExpert(config=preset.language_model, tensors={}, tokenizer=tokenizer, prompt=preset.prompt)
    vision = VisionExpert(config=preset.vision, tensors={})
    assert preset_config(preset, text, vision, preset.name) == preset
    assert tokenizer.get_vocab_size() == preset.language_model.num_token_ids


def test_the_tokenizer_has_every_byte_and_the_markers_follow_the_vocabulary(tmp_path: Path) -> None:
    config = build(tmp_path / "model").config
    tokenizer = PromptTokenizer.load(tmp_path / "model", config.prompt)
    text = "An image: <image> größer 🦩\n"
    assert tokenizer.decode(tokenizer.encode_plain(text)) == text
    assert max(tokenizer.encode_plain(text)) < 256
    assert (tokenizer.id_of("<EOS>"), tokenizer.media_token_id, tokenizer.id_of("<EOC>")) == (256, 257, 258)
    padded = byte_tokenizer(300, ("<image>", "<EOC>"))
    assert padded.id_to_token(299) == "<unused42>"
    assert padded.token_to_id("<image>") == 300
    assert padded.encode("<unused42>").ids == [padded.token_to_id(letter) for letter in "<unused42>"]


def test_the_same_command_writes_the_same_weights(tmp_path: Path) -> None:
    first, second = (build(tmp_path / name).state_dict() for name in ("first", "second"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_given_experts_keep_their_sizes_and_the_bridge_is_the_presets(tmp_path: Path) -> None:
    experts = ("--language-model", str(LLAMA), "--vision-model", str(CLIP))
    model = build(tmp_path / "model", *experts, "--gate", "0.5", "--dtype", "float32")
    resampler, gated = model.config.resampler, model.config.gated
    assert resampler == tiny(PRESETS["flamingo-3b"]).resampler
    assert (gated.first_layer, gated.interval, gated.num_heads) == (0, 1, model.config.language_model.num_heads)
    assert model.config.language_model.family == "llama"
    assert all((gate == 0.5).all() for name, gate in model.named_parameters() if name.endswith("_gate"))
    origin = json.loads((tmp_path / "model" / "SOURCE.json").read_text())
    assert [part["part"] for part in origin["parts"]] == ["language model", "vision model"]


def test_one_expert_may_be_random(tmp_path: Path) -> None:
    config = build(tmp_path / "model", "--vision-model", str(CLIP)).config
    assert config.vision.architecture == "clip_vit"
    assert config.language_model == tiny(PRESETS["flamingo-3b"]).language_model


def test_a_gguf_file_may_be_the_language_model(tmp_path: Path) -> None:
    gguf.write(tmp_path / "tiny.gguf", gguf.tiny_llama(tied=True), license="apache-2.0")
    config = build(tmp_path / "model", "--language-model", str(tmp_path / "tiny.gguf")).config
    assert (config.language_model.family, config.gated_layers) == ("llama", (0, 1))
    (part,) = read_origin(tmp_path / "model").parts
    assert (part.part, part.license) == ("language model", "apache-2.0")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["flamingo-4b"], "'flamingo-4b' is not a preset, must be one of flamingo-3b, flamingo-9b, flamingo-80b"),
        (["flamingo-9b", "--language-model", str(LLAMA)], "cross_attn_every is 4, but the language model has 2 layers"),
        (["flamingo-3b", "--vision-model", "nowhere"], "nowhere is neither a folder nor the name of a repository"),
        (["flamingo-3b", "--out", str(CLIP / "config.json" / "out")], "File exists"),
        (["flamingo-3b", "--out", str(CLIP)], "already exists and is not an empty folder"),
    ],
)
def test_what_cannot_be_built_gives_one_line(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", "--scale", "tiny", "--out", str(tmp_path / "out"), *arguments]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert complaint in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("gate", ["nan", "inf", "1e40"])
def test_a_gate_that_no_weight_can_have_is_refused(
    gate: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["build", "flamingo-3b", "--scale", "tiny", "--gate", gate, "--out", str(tmp_path / "out")])
    assert f"argument --gate: {gate} is not a valid value of a gate" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_built_preset_is_trained_and_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "start")
    write_shards(pairs(8), tmp_path / "shards", 8)
    (tmp_path / "run.yaml").write_text(
        f"{{model: {tmp_path}/start, out: {tmp_path}/run, name: trained, steps: 3,"
        f" sets: [{{name: pairs, kind: pairs, shards: {tmp_path}/shards/*.tar, batch_size: 2}}],"
        " optim: {learning_rate: 1.0e-2, warmup_steps: 1}}"
    )
    monkeypatch.setattr("sys.argv", ["training", str(tmp_path / "run.yaml")])
    training.main()
    trained = tmp_path / "run" / "model"
    assert load_config(trained) == dataclasses.replace(tiny(PRESETS["flamingo-3b"]), name="trained")
    gates = {name: gate for name, gate in load_file(trained / "model.safetensors").items() if name.endswith("_gate")}
    assert len(gates) == 2 * 24
    assert all(gate.any() for gate in gates.values())
    log_probs = {}
    with running(trained, tmp_path / "log", "-m", "server") as server:
        for colour in ("red", "blue"):
            prompt = [image_part(png(colour)), {"type": "text", "text": "a"}]
            answer = server.complete(prompt=prompt, max_tokens=4, temperature=0, logprobs=0, ignore_eos=True)
            assert answer["model"] == "trained"
            assert answer["usage"]["completion_tokens"] == 4
            log_probs[colour] = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert log_probs["red"] != log_probs["blue"]
