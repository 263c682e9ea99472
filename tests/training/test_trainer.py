"""Tests of a run on toy shards: learning, exact resuming, unchanged frozen weights, and stopping at a nonfinite loss."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save

from model.config import ConfigError
from model.folder import load_folder, save_folder, save_vision_folder
from model.hub.job import SOURCE, Origin, Part, read_origin
from model.likeness import LIKENESS
from model.prior import PRIOR
from tests.tiny_models import byte_tokenizer, tiny_model
from tests.training.toy import CONFIG, losses, make_run, make_trainer, pairs
from training.bridge import frozen_digest
from training.checkpoint import POSITIONS, export
from training.config import TrainConfig
from training.data.make import write_shards
from training.distributed import World
from training.step import NonFiniteLoss, Stepper
from training.stop import StopSignal
from training.trainer import NO_GRADIENT, FrozenWeightsChanged, _wait_while_paused, kept_files, run


def test_a_run_lowers_the_loss(tmp_path: Path) -> None:
    step_losses = losses(make_trainer(make_run(tmp_path, steps=12)))
    assert step_losses[-1]["pairs"] < 0.8 * step_losses[0]["pairs"]


@pytest.mark.parametrize(("precision", "matrices"), [("float32", "adamw"), ("bfloat16", "adamw"), ("float32", "muon")])
def test_a_resumed_run_has_the_same_losses(tmp_path: Path, precision: str, matrices: Literal["adamw", "muon"]) -> None:
    config = make_run(tmp_path, steps=5, precision=precision)
    config = replace(config, optim=replace(config.optim, matrices=matrices))
    expected_losses = losses(make_trainer(config))
    interrupted = make_trainer(config)
    first = [dict(next(interrupted.steps()).losses) for _ in range(3)]
    interrupted.save()
    resumed = make_trainer(config)
    assert resumed.resume() == 3
    assert first + losses(resumed) == expected_losses


def test_streams_that_the_processes_cannot_share_are_refused(tmp_path: Path) -> None:
    config = make_run(tmp_path, streams=1)
    with pytest.raises(ConfigError, match="set pairs: 1 streams cannot be divided evenly among 2 processes"):
        make_trainer(config, World(rank=0, size=2, device=torch.device("cpu")))


def test_sequences_longer_than_the_language_models_positions_are_refused(tmp_path: Path) -> None:
    language_model = replace(CONFIG.language_model, position="learned", rotary_dim=0, max_positions=16)
    config = make_run(tmp_path, model=replace(CONFIG, language_model=language_model))
    with pytest.raises(
        ConfigError, match="set pairs: max_tokens is 256, must be at most 16, the language model's learned"
    ):
        make_trainer(config)
    assert losses(make_trainer(replace(config, sets=(replace(config.sets[0], max_tokens=16),))))


def test_muon_is_refused_if_matrices_are_sharded(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    alone = make_trainer(config).stepper
    config = replace(config, optim=replace(config.optim, matrices="muon"))
    with pytest.raises(ConfigError, match="muon needs unsharded matrices, but 2 processes"):
        Stepper(config, alone.loss, alone.mixture, World(rank=0, size=2, device=torch.device("cpu")))


def test_a_complete_run_writes_the_served_folder_and_a_log(tmp_path: Path) -> None:
    config = make_run(tmp_path, steps=4)
    file = tmp_path / "tokenizer.json"
    file.write_text(byte_tokenizer().to_str())
    trainer = make_trainer(config)
    run(trainer, file)
    served = load_folder(tmp_path / "out" / "model", "cpu", torch.float32)
    assert torch.equal(served.resampler.latents, trainer.model.resampler.latents)
    assert served.config == replace(trainer.model.config, name="out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert {"gated.0.attn_gate", "gated.3.ffw_gate"} <= lines[0]["gates"].keys()
    assert sorted(p.name for p in (tmp_path / "out" / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


def test_the_export_keeps_the_licences_of_the_experts_that_it_contains(tmp_path: Path) -> None:
    config = make_run(tmp_path, steps=1)
    language_model = Part(part="language model", repository="a/decoder", commit="1", license="mit")
    vision_model = Part(part="vision model", repository="b/encoder", commit="2", license="cc-by-nc-4.0")
    origin = Origin(revision="main", parts=(language_model, vision_model))
    (tmp_path / "model" / SOURCE).write_text(origin.to_json())
    run(make_trainer(config), tmp_path / "model" / "tokenizer.json")
    assert read_origin(tmp_path / "out" / "model") == Origin(parts=(language_model, vision_model))
    for changes, kept in (({"vision": "encoder"}, language_model), ({"language_model": "scratch"}, vision_model)):
        changed = replace(config, bridge="start", trains=("bridge", "language_model"), **changes)  # type: ignore[arg-type]
        assert kept_files(tmp_path / "model", changed) == {SOURCE: Origin(parts=(kept,)).to_json()}


def test_the_export_keeps_the_likeness_of_images_while_the_encoder_sees_them_as_before(tmp_path: Path) -> None:
    config = make_run(tmp_path, steps=1)
    files = {LIKENESS: save({"vectors": torch.ones(1)}), PRIOR: b"prior"}
    for name, content in files.items():
        (tmp_path / "model" / name).write_bytes(content)
    run(make_trainer(config), tmp_path / "model" / "tokenizer.json")
    assert {name: (tmp_path / "out" / "model" / name).read_bytes() for name in files} == files
    for changes in ({"vision": "encoder"}, {"image_size": 16}, {"trains": ("bridge", "vision")}):
        assert not kept_files(tmp_path / "model", replace(config, bridge="start", **changes))


def test_a_model_without_sources_is_exported_without_them(tmp_path: Path) -> None:
    run(make_trainer(make_run(tmp_path, steps=1)), tmp_path / "model" / "tokenizer.json")
    assert not (tmp_path / "out" / "model" / SOURCE).exists()


def test_a_failed_export_leaves_the_last_one_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(make_run(tmp_path, steps=1))
    tokenizer_json, folder = tmp_path / "model" / "tokenizer.json", tmp_path / "out" / "model"
    run(trainer, tokenizer_json)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr("training.checkpoint.gather_weights", lambda model: iter([("no_tensor", None)]))
    with pytest.raises(AttributeError):
        export(trainer.model, tokenizer_json, folder, trainer.world, "again")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert not list(folder.parent.glob(".model*"))


def test_an_export_may_replace_the_model_that_it_reads(tmp_path: Path) -> None:
    trainer = make_trainer(make_run(tmp_path, steps=1))
    losses(trainer)
    folder = tmp_path / "model"
    export(trainer.model, folder / "tokenizer.json", folder, trainer.world, "further")
    served = load_folder(folder, "cpu", torch.float32)
    assert served.config.name == "further"
    assert torch.equal(served.resampler.latents, trainer.model.resampler.latents)


def test_a_finished_run_does_no_further_steps(tmp_path: Path) -> None:
    config = make_run(tmp_path, steps=2)
    trainer = make_trainer(config)
    losses(trainer)
    trainer.save()
    again = make_trainer(config)
    again.resume()
    assert losses(again) == []


def changed_set(config: TrainConfig, **fields: Any) -> TrainConfig:
    return replace(config, sets=(replace(config.sets[0], **fields), *config.sets[1:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, seed=5), "seed was 0 and is 5"),
        (lambda c: changed_set(c, streams=1), "sets.pairs.streams was 2 and is 1"),
        (lambda c: changed_set(c, window=8), "sets.pairs.window was 4 and is 8"),
        (lambda c: changed_set(c, p_alone=0.5), "sets.pairs.p_alone was None and is 0.5"),
        (lambda c: replace(c, sets=(*c.sets, replace(c.sets[0], name="new"))), "sets.new was added"),
        (lambda c: replace(c, sets=c.sets[:1]), "sets.again was removed"),
        (lambda c: replace(c, optim=replace(c.optim, learning_rate=0.5)), "optim.learning_rate was 0.01 and is 0.5"),
        (lambda c: replace(c, optim=replace(c.optim, matrices="muon")), "optim.matrices was adamw and is muon"),
        (lambda c: replace(c, trains=("bridge", "vision")), r"trains was \['bridge'\] and is \['bridge', 'vision'\]"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    tmp_path: Path, change: Callable[[TrainConfig], TrainConfig], message: str
) -> None:
    config = make_run(tmp_path)
    make_trainer(config).save()
    with pytest.raises(ConfigError, match=f"step-00000000 cannot be continued with other settings: {message}. Restore"):
        make_trainer(change(config)).resume()


def test_a_checkpoint_of_other_shards_under_the_same_pattern_is_refused(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    path = make_trainer(config).save()
    shards = sorted((tmp_path / "shards").glob("*.tar"))
    added = shutil.copy(shards[0], tmp_path / "shards" / "more.tar")
    with pytest.raises(ConfigError, match=r"sets\.pairs\.shard_files was 4 files \(\w+\) and is 5 files .*sets\.again"):
        make_trainer(config).resume()
    Path(added).unlink()
    assert make_trainer(config).resume() == 0
    write_shards(pairs(9), tmp_path / "other", 9)
    (tmp_path / "other" / shards[0].name).replace(shards[0])
    with pytest.raises(ConfigError, match=r"shard_files was 4 files \(\w+\) and is 4 files"):
        make_trainer(config).resume()
    positions = json.loads((path / POSITIONS).read_text())
    for fields in positions["settings"]["sets"].values():
        del fields["shard_files"]
    (path / POSITIONS).write_text(json.dumps(positions))
    assert make_trainer(config).resume() == 0  # a checkpoint from before shards were compared


def test_a_checkpoint_of_another_model_is_refused_but_its_folder_may_move(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    make_trainer(config).save()
    moved = (tmp_path / "model").rename(tmp_path / "moved")
    assert make_trainer(replace(config, model=str(moved))).resume() == 0
    other = tiny_model(CONFIG, seed=9).state_dict()
    save_folder(tmp_path / "model", CONFIG, other.items(), byte_tokenizer().to_str())
    with pytest.raises(ConfigError, match="with other settings: the files of model have changed"):
        make_trainer(config).resume()


def test_a_checkpoint_of_another_encoder_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    config = replace(make_run(tmp_path), bridge="start", vision=str(tmp_path / "vision"))
    encoder = tiny_model(CONFIG, seed=1).vision
    save_vision_folder(tmp_path / "vision", encoder.config, encoder.state_dict())
    make_trainer(config).save()
    assert make_trainer(config).resume() == 0
    save_vision_folder(tmp_path / "vision", encoder.config, tiny_model(CONFIG, seed=2).vision.state_dict())
    with pytest.raises(ConfigError, match="with other settings: the files of vision have changed"):
        make_trainer(config).resume()


def test_settings_that_affect_no_update_may_change_and_old_checkpoints_have_none(tmp_path: Path) -> None:
    config = make_run(tmp_path, steps=2)
    trainer = make_trainer(config)
    losses(trainer)
    path = trainer.save()
    assert make_trainer(replace(config, steps=4, log_steps=7, checkpoint_steps=9, pack_tokens=99)).resume() == 2
    positions = json.loads((path / POSITIONS).read_text())
    del positions["settings"]
    (path / POSITIONS).write_text(json.dumps(positions))
    assert make_trainer(replace(config, seed=5)).resume() == 2


def test_the_last_two_checkpoints_are_kept_and_the_latest_is_resumed(tmp_path: Path) -> None:
    config = make_run(tmp_path, steps=6)
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer().to_str())
    run(make_trainer(config), tmp_path / "tokenizer.json")
    kept = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006"]
    assert make_trainer(config).resume() == 6


def test_all_processes_pause_if_one_of_them_sees_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that went on would wait in the next step for the others, until its backend gives up after minutes."""
    seen = [0, 1, 0, 1, 0, 0]  # after each 1, a process says whether a signal arrived
    pauses: list[float] = []

    class Two(World):
        def max(self, value: int) -> int:
            return max(value, seen.pop(0))

    monkeypatch.setattr("training.trainer.time.sleep", pauses.append)
    _wait_while_paused(tmp_path / "absent", Two(), StopSignal())
    _wait_while_paused(tmp_path / "absent", Two(), StopSignal())
    assert (len(pauses), seen) == (2, [])


def test_a_nonfinite_loss_stops_the_run_before_the_update(tmp_path: Path) -> None:
    trainer = make_trainer(make_run(tmp_path))
    with torch.no_grad():
        trainer.model.resampler.latents[0, 0] = torch.nan
    before = trainer.model.resampler.norm.weight.clone()
    with pytest.raises(NonFiniteLoss, match="step 0: pairs is nan"):
        losses(trainer)
    assert torch.equal(trainer.model.resampler.norm.weight, before)


def test_a_run_without_a_gradient_is_warned_about_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_run(tmp_path, steps=2, trains=("vision",))
    trainer = make_trainer(config)
    with torch.no_grad():
        for gated in trainer.model.gated.values():
            for name, gate in gated.named_parameters():
                gate.mul_(0.0 if name.endswith("_gate") else 1.0)
    trainer.digest = frozen_digest(trainer.model, config.trains)
    run(trainer, tmp_path / "model" / "tokenizer.json")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [f"warning: the gradient of step 0 is zero: {NO_GRADIENT}"]


def test_weights_that_are_not_finite_are_neither_saved_nor_exported(tmp_path: Path) -> None:
    config = make_run(tmp_path, steps=2)
    steep = replace(config, optim=replace(config.optim, learning_rate=1e10, weight_decay=1e30, warmup_steps=0), steps=1)
    with pytest.raises(
        NonFiniteLoss, match=r"^after step 1: the weights \S+ and \d+ others are not finite; they are not"
    ):
        run(make_trainer(steep), tmp_path / "model" / "tokenizer.json")
    assert not list((tmp_path / "out").glob("checkpoints/*"))
    trainer = make_trainer(replace(config, steps=0))
    with torch.no_grad():
        trainer.model.resampler.latents[0, 0] = torch.inf
    with pytest.raises(NonFiniteLoss, match=r"the weights \S+resampler\.latents are not finite"):
        run(trainer, tmp_path / "model" / "tokenizer.json")
    assert not (tmp_path / "out" / "model").exists()


def test_a_changed_frozen_weight_fails_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(make_run(tmp_path))
    trainer.check_frozen()
    with torch.no_grad():
        trainer.model.language_model.norm.weight.add_(0.5)
    with pytest.raises(FrozenWeightsChanged, match=trainer.digest):
        trainer.check_frozen()


def test_a_run_that_changed_a_frozen_weight_exports_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(make_run(tmp_path, steps=1))
    with torch.no_grad():
        trainer.model.language_model.norm.weight.add_(0.5)
    with pytest.raises(FrozenWeightsChanged):
        run(trainer, tmp_path / "model" / "tokenizer.json")
    assert not (tmp_path / "out" / "model").exists()


def test_a_step_changes_the_bridge_and_no_frozen_weight(tmp_path: Path) -> None:
    trainer = make_trainer(make_run(tmp_path, precision="bfloat16"))
    before = trainer.model.state_dict()["gated.0.attn_gate"].clone()
    losses(trainer)
    trainer.check_frozen()
    assert not torch.equal(trainer.model.state_dict()["gated.0.attn_gate"], before)


def test_a_round_robin_step_learns_from_one_set(tmp_path: Path) -> None:
    config = replace(make_run(tmp_path), accumulate="round_robin")
    assert [list(step) for step in losses(make_trainer(config))] == [["pairs"], ["again"], ["pairs"], ["again"]]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activation_checkpointing_changes_no_gradient(tmp_path: Path, precision: str) -> None:
    config = make_run(tmp_path, steps=2, precision=precision, trains=("bridge", "vision", "language_model"))
    stored, recomputed = (make_trainer(replace(config, activation_checkpointing=on)) for on in (False, True))
    assert losses(stored) == losses(recomputed)
    both = zip(stored.stepper.named_parameters, recomputed.stepper.named_parameters, strict=True)
    for (name, expected), (_, parameter) in both:
        assert expected.grad is not None
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, expected.grad), name


def test_the_pack_size_does_not_change_the_losses(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    small, large = (losses(make_trainer(replace(config, pack_tokens=size))) for size in (8, 4096))
    for small_losses, large_losses in zip(small, large, strict=True):
        assert small_losses == pytest.approx(large_losses, rel=1e-4)
