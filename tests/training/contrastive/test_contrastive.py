"""Tests of contrastive pretraining: the loss, clipping, learning on toy data, resuming, and the export of the encoder."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame
from torch import Tensor

from model.config import ConfigError
from model.folder import CheckpointError, load_folder, load_vision_folder
from tests.tiny_models import byte_tokenizer
from tests.training import toy
from tests.training.contrastive.shapes import KINDS, SIZE, draw_shape, make_run
from training.contrastive.__main__ import train
from training.contrastive.config import ImageConfig, parse_config
from training.contrastive.data import Pair, PairReader, Pairs, augment, read_all_pairs
from training.contrastive.towers import ImageTower, TextTower, contrastive_loss, recall, vision_config
from training.contrastive.trainer import ContrastiveTrainer
from training.data.make import write_shards
from training.data.shards import RawRecord, ShardError
from training.data.stream import find_shards
from training.step import NonFiniteLoss
from training.trainer import run

CPU = torch.device("cpu")


def unit(rows: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def losses(trainer: ContrastiveTrainer) -> list[dict[str, float]]:
    return [dict(report.losses) for report in trainer.steps()]


def test_the_loss_is_the_sum_of_both_directions_definitions() -> None:
    images, texts, scale, smoothing = unit(5, 0), unit(5, 1), torch.tensor(7.0), 0.1
    expected = 0.0
    for a, b in ((images, texts), (texts, images)):
        for row in range(5):
            logits = [float(scale * (a[row] * b[column]).sum()) for column in range(5)]
            log_total = math.log(sum(math.exp(x) for x in logits))
            target = [smoothing / 5 + (1 - smoothing) * (column == row) for column in range(5)]
            expected += sum(t * (log_total - x) for t, x in zip(target, logits, strict=True)) / 5
    assert float(contrastive_loss(images, texts, scale, smoothing)) == pytest.approx(expected, rel=1e-5)


def test_recall_counts_rows_whose_nearest_is_their_counterpart() -> None:
    images = torch.eye(4)
    assert recall(images, images) == (1.0, 1.0)
    assert recall(images, images[[1, 0, 2, 3]]) == (0.5, 0.5)


def test_padding_does_not_change_a_texts_embedding() -> None:
    config = parse_config(MINIMAL).text
    tower = TextTower(replace(config, dim=16, num_layers=2, num_heads=2, ffn_dim=32), 50, 8).eval()
    short, long = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7, 9, 9], [1, 2, 3, 4, 5]])
    alone = tower(short, torch.tensor([3]))
    torch.testing.assert_close(tower(long, torch.tensor([3, 5]))[:1], alone, atol=1e-5, rtol=1e-5)


def test_a_short_run_learns_to_match_held_out_images_and_captions(tmp_path: Path) -> None:
    trainer = ContrastiveTrainer(make_run(tmp_path, steps=50), CPU)
    shards = find_shards(trainer.config.held_out)
    before = trainer.recall(shards)
    losses(trainer)
    to_text, to_image = trainer.recall(shards)
    assert max(before) < 0.35
    # chance: 1 of 36
    assert len(KINDS) == 36
    assert to_text > 0.7
    assert to_image > 0.7


def test_the_recall_holds_one_batch_of_images_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = ContrastiveTrainer(make_run(tmp_path, steps=1, batch_size=6), CPU)
    order: list[str] = []
    embed = trainer._embed

    def read(shards: Sequence[Path], reader: PairReader) -> Iterator[Pair]:
        for pair in read_all_pairs(shards, reader):
            order.append("r")
            yield pair

    def embedded(batch: Pairs) -> tuple[Tensor, Tensor]:
        order.append("e")
        return embed(batch)

    monkeypatch.setattr("training.contrastive.trainer.BATCH", 16)
    monkeypatch.setattr("training.contrastive.trainer.read_all_pairs", read)
    monkeypatch.setattr(trainer, "_embed", embedded)
    trainer.recall(find_shards(trainer.config.held_out))
    assert "".join(order) == f"{'r' * 16}e{'r' * 16}e{'r' * 4}e"


@pytest.mark.parametrize(("optimizer", "precision"), [("adam", "float32"), ("lamb", "bfloat16")])
def test_a_resumed_run_has_the_same_losses_and_weights(
    tmp_path: Path, optimizer: str, precision: Literal["float32", "bfloat16"]
) -> None:
    config = make_run(tmp_path, steps=5, batch_size=7, optimizer=optimizer)
    config = replace(config, image=replace(config.image, augment=True), precision=precision)
    uninterrupted = ContrastiveTrainer(config, CPU)
    expected_losses = losses(uninterrupted)
    interrupted = ContrastiveTrainer(config, CPU)
    first = [dict(next(interrupted.steps()).losses) for _ in range(3)]
    interrupted.save()
    resumed = ContrastiveTrainer(config, CPU)
    assert resumed.resume() == 3
    assert first + losses(resumed) == expected_losses
    expected = uninterrupted.towers.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.towers.state_dict().items())


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    config = make_run(tmp_path, steps=1, batch_size=6)
    ContrastiveTrainer(config, CPU).save()
    assert ContrastiveTrainer(replace(config, steps=3, held_out=""), CPU).resume() == 0
    with pytest.raises(ConfigError, match="cannot be continued with other settings: seed was 0 and is 3"):
        ContrastiveTrainer(replace(config, seed=3), CPU).resume()
    first = find_shards(config.sets[0].shards)[0]
    shutil.copy(first, first.with_name("more.tar"))
    with pytest.raises(ConfigError, match=rf"sets\.{config.sets[0].name}\.shard_files was \d+ files"):
        ContrastiveTrainer(config, CPU).resume()


def test_a_checkpoint_of_another_tokenizer_in_the_same_file_is_refused(tmp_path: Path) -> None:
    config = make_run(tmp_path, steps=1, batch_size=6)
    ContrastiveTrainer(config, CPU).save()
    file = Path(config.text.tokenizer)
    file.write_text(json.dumps(json.loads(file.read_text())))  # other bytes
    with pytest.raises(ConfigError, match=r"with other settings: the files of text\.tokenizer have changed"):
        ContrastiveTrainer(config, CPU).resume()


def test_a_checkpoint_of_more_steps_is_refused(tmp_path: Path) -> None:
    trainer = ContrastiveTrainer(make_run(tmp_path, steps=1, batch_size=6), CPU)
    trainer.num_steps_done = 2
    trainer.save()
    with pytest.raises(ConfigError, match=r"^steps is 1, but \S+/step-00000002\.pt has more"):
        ContrastiveTrainer(trainer.config, CPU).resume()


def test_copies_of_checkpoints_are_neither_resumed_nor_deleted(tmp_path: Path) -> None:
    trainer = ContrastiveTrainer(make_run(tmp_path, steps=3, batch_size=6), CPU)
    copies = {"step-00000001 (copy).pt", "step-00000009-best.pt", "step-mine.pt"}
    trainer.save()
    folder = tmp_path / "out" / "checkpoints"
    for name in copies:
        (folder / name).write_bytes(b"")
    for trainer.num_steps_done in (1, 2):
        trainer.save()
    assert {file.name for file in folder.iterdir()} == {*copies, "step-00000001.pt", "step-00000002.pt"}
    assert ContrastiveTrainer(trainer.config, CPU).resume() == 2


def without(state: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda state: b"", "cannot be read"),
        (lambda state: saved_bytes(state)[:5000], "cannot be read"),
        (lambda state: saved_bytes([1]), "holds a list"),
        (lambda state: saved_bytes(without(state, "step")), "KeyError: 'step'"),
        (lambda state: saved_bytes(without(state, "towers")), "KeyError: 'towers'"),
        (lambda state: saved_bytes({**state, "towers": {}}), "Missing key"),
        (lambda state: saved_bytes({**state, "optimizer": 5}), "object"),
        (lambda state: saved_bytes(without(state, "streams")), "KeyError: 'streams'"),
    ],
)
def test_a_damaged_checkpoint_is_named_with_the_older_one(
    damage: Callable[[dict[str, Any]], bytes], reason: str, tmp_path: Path
) -> None:
    trainer = ContrastiveTrainer(make_run(tmp_path, steps=3, batch_size=6), CPU)
    trainer.save()
    trainer.num_steps_done = 1
    path = trainer.save()
    path.write_bytes(damage(torch.load(path, weights_only=True)))
    with pytest.raises(CheckpointError, match=rf"step-00000001\.pt is damaged: .*{reason}.*step-00000000\.pt$"):
        ContrastiveTrainer(trainer.config, CPU).resume()


def saved_bytes(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_is_one_line_and_is_not_kept_full(tmp_path: Path) -> None:
    trainer = ContrastiveTrainer(make_run(tmp_path, steps=1, batch_size=6), CPU)
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out" / "checkpoints" / "partial.pt").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"step-00000000\.pt cannot be written: .*No space left on device$"):
        trainer.save()
    assert not list((tmp_path / "out" / "checkpoints").iterdir())


def test_a_disk_that_is_full_at_the_export_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*args: object, **kwargs: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    trainer = ContrastiveTrainer(make_run(tmp_path, steps=1, batch_size=6), CPU)
    monkeypatch.setattr("model.folder.save_file", fill)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left on device"):
        trainer.export()
    assert not (tmp_path / "out" / "vision").exists()


def test_missing_held_out_shards_are_refused_at_the_start(tmp_path: Path) -> None:
    config = replace(make_run(tmp_path, steps=1, batch_size=6), held_out=str(tmp_path / "none" / "*.tar"))
    with pytest.raises(ShardError, match="no shard matches"):
        ContrastiveTrainer(config, CPU)


def test_held_out_shards_without_a_good_pair_are_named_after_the_export(tmp_path: Path) -> None:
    config = make_run(tmp_path, steps=1, batch_size=6)
    write_shards([RawRecord("x", {"png": b"no image", "txt": b"a"})], tmp_path / "bad", 10)
    trainer = ContrastiveTrainer(replace(config, held_out=str(tmp_path / "bad" / "*.tar")), CPU)
    with pytest.raises(ShardError, match=r"held_out: no record of \S+000000.tar is a good pair"):
        train(trainer)
    assert load_vision_folder(trainer.out / "vision").config == trainer.towers.image.vision.config


def test_a_step_adds_the_gradients_of_both_sets(tmp_path: Path) -> None:
    config = make_run(tmp_path, steps=1, batch_size=6)
    config = replace(config, optim=replace(config.optim, image_clip=0.0, text_clip=0.0))
    both = ContrastiveTrainer(config, CPU)
    losses(both)
    total = [p.grad for p in both.towers.parameters()]
    parts = []
    for data_set in config.sets:
        single = ContrastiveTrainer(replace(config, sets=(data_set,)), CPU)
        losses(single)
        parts.append([p.grad for p in single.towers.parameters()])
    for whole, first, second in zip(total, *parts, strict=True):
        assert whole is not None
        assert first is not None
        assert second is not None
        torch.testing.assert_close(whole, first + second, atol=1e-5, rtol=1e-4)


def test_each_tower_is_clipped_by_its_own_rule(tmp_path: Path) -> None:
    config = make_run(tmp_path, steps=1, batch_size=6)
    trainer = ContrastiveTrainer(replace(config, optim=replace(config.optim, text_clip=1e-3)), CPU)
    before = {name: p.detach().clone() for name, p in trainer.towers.named_parameters()}
    losses(trainer)
    gradients = {name: p.grad for name, p in trainer.towers.named_parameters() if p.grad is not None}
    text = torch.stack([g.norm() for name, g in gradients.items() if name.startswith("text.")])
    assert float(text.norm()) == pytest.approx(1e-3, rel=1e-3)
    stem = "image.vision.encoder.stem.conv1.weight"
    rows, gradient = before[stem].flatten(1).norm(dim=1), gradients[stem].flatten(1).norm(dim=1)
    assert bool((gradient <= 0.01 * rows.clamp(min=1e-3) * 1.001).all())


def test_a_nonfinite_loss_stops_the_run_before_the_update(tmp_path: Path) -> None:
    trainer = ContrastiveTrainer(make_run(tmp_path, steps=2, batch_size=6), CPU)
    with torch.no_grad():
        trainer.towers.log_scale.fill_(torch.nan)
    before = trainer.towers.text.projection.weight.clone()
    with pytest.raises(NonFiniteLoss, match="step 0: align is nan, ltip is nan, gradient norm is nan; no weight"):
        losses(trainer)
    assert torch.equal(trainer.towers.text.projection.weight, before)


def test_the_encoder_replaces_a_models_encoder_and_can_be_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = ContrastiveTrainer(make_run(tmp_path, steps=2, batch_size=6), CPU)
    folder = train(trainer)
    assert "recall at 1 on held-out pairs: image to text" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out" / "checkpoints").iterdir()) == ["step-00000002.pt"]
    encoder = load_vision_folder(folder)
    pixels = torch.randn(1, 3, SIZE, SIZE)
    torch.testing.assert_close(encoder(pixels), trainer.towers.image.eval().vision(pixels))

    config = replace(toy.make_run(tmp_path / "bridge", steps=2), vision=str(folder), bridge="start")
    (tmp_path / "bridge" / "tokenizer.json").write_text(byte_tokenizer().to_str())
    bridge = toy.make_trainer(config)
    run(bridge, tmp_path / "bridge" / "tokenizer.json")
    served = load_folder(tmp_path / "bridge" / "out" / "model", "cpu", torch.float32)
    assert served.config.vision == encoder.config
    assert all(torch.equal(tensor, served.vision.state_dict()[name]) for name, tensor in encoder.state_dict().items())


def test_an_invalid_vision_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a vision folder"):
        load_vision_folder(tmp_path)
    folder = ContrastiveTrainer(make_run(tmp_path, steps=1, batch_size=6), CPU).export()
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("test_nfnet", "test_resnet").replace("192", "96"))
    with pytest.raises(CheckpointError, match=r"encoder\."):
        load_vision_folder(folder)


@pytest.mark.parametrize("name", [f"{kind}_f{n}" for kind in ("nfnet", "dm_nfnet") for n in range(7)])
def test_the_papers_networks_can_be_built_by_name(name: str) -> None:
    config = vision_config(ImageConfig(architecture=name))
    assert (config.feature_dim, config.num_patches) == (3072, 81)
    with torch.device("meta"):
        tower = ImageTower(config, 1376).train()
    assert any(isinstance(module, ScaledStdConv2d | ScaledStdConv2dSame) for module in tower.modules())
    assert not [name for name, _ in tower.named_buffers()]


@pytest.mark.parametrize(
    ("name", "image_size", "message"),
    [
        ("resnet_of_dreams", 160, "is not a model of timm"),
        ("test_vit", 160, "must be a channels-first map"),
        ("vit_tiny_patch16_224", 64, "cannot read images of image_size 64"),
        ("vgg11", 16, "cannot read images of image_size 16"),
    ],
)
def test_unsupported_networks_are_refused(name: str, image_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vision_config(ImageConfig(architecture=name, image_size=image_size))


def test_the_image_towers_batch_norms_update_their_statistics_in_training_mode() -> None:
    tower = ImageTower(vision_config(ImageConfig(architecture="test_resnet", image_size=64)), 8).train()
    before = {name: tensor.clone() for name, tensor in tower.named_buffers() if "running_mean" in name}
    tower(torch.randn(4, 3, 64, 64))
    assert all(not torch.equal(before[name], dict(tower.named_buffers())[name]) for name in before)
    assert before
    tower.eval()
    assert not [module for module in tower.modules() if module.training]


def test_augmented_images_depend_on_the_seed_alone() -> None:
    square = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    images = [augment(square, Random(seed)) for seed in range(6)]
    assert all(image.shape == square.shape and image.dtype == np.uint8 for image in images)
    assert len({image.tobytes() for image in images}) == 6
    assert np.array_equal(images[0], augment(square, Random(0)))


def test_images_of_a_kind_differ() -> None:
    assert draw_shape("red", "bar", Random(0)) != draw_shape("red", "bar", Random(1))


MINIMAL: dict[str, object] = {
    "out": "o",
    "steps": 3,
    "image": {"architecture": "nfnet_f0"},
    "text": {"tokenizer": "tokenizer.json"},
    "sets": [{"name": "a", "shards": "*.tar"}],
}


def test_a_minimal_run_has_the_papers_defaults() -> None:
    config = parse_config(MINIMAL)
    assert (config.joint_dim, config.label_smoothing, config.image.image_size) == (1376, 0.1, 288)
    assert (config.optim.image_clip, config.optim.text_clip, config.optim.learning_rate) == (0.01, 10.0, 1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steppes": 1}, "config: unknown key steppes"),
        ({"optim": {"optimizer": "sgd"}}, "config.optim.optimizer: 'sgd' is not one of 'adam', 'lamb'"),
        ({"sets": []}, "sets is empty, must list at least one set"),
        ({"sets": [{"name": "a", "shards": "x"}] * 2}, "sets must have different names: a, a"),
        ({"sets": [{"name": "a", "shards": "x", "batch_size": 1}]}, "batch_size is 1, must be at least 2"),
        ({"sets": None}, "config.sets: expected a list, got NoneType"),
        ({"checkpoint_steps": 0}, "checkpoint_steps is 0, must be at least 1"),
        ({"optim": {"text_clip": -1.0}}, "optim.text_clip is -1.0, must be at least 0"),
        ({"seed": 2**70}, "seed has too many digits"),
        ({"image": {"architecture": "a", "image_size": 4097}}, "image.image_size is 4097, must be at most 4096"),
        ({"out": ""}, "out is empty, must be a text"),
        ({"held_out": "~no-such-user/x"}, "held_out is ~no-such-user/x, but there is no such user"),
        ({"text": {"tokenizer": "~no-such-user/t"}}, "text.tokenizer is ~no-such-user/t, but there is no such user"),
        ({"temperature": 0}, "temperature is 0.0, must be positive"),
        ({"label_smoothing": 1}, "label_smoothing is 1.0"),
        ({"text": {"tokenizer": "t", "dim": 10, "num_heads": 3}}, "text.dim 10 is not a multiple of text.num_heads 3"),
    ],
)
def test_an_invalid_configuration_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**MINIMAL, **change})
