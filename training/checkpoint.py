"""Saves and loads a run's state: bridge, optimizer and every stream's position, in torch.distributed.checkpoint's format.

A checkpoint is written to a temporary folder and renamed, so it is never partial. Any number of processes can read what
another number wrote, and a resumed run has the losses that it would have had without the interruption. `export` writes
the folder that the server reads.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.flamingo import Flamingo
from model.folder import NO_FILES, WEIGHTS, CheckpointError, SafetensorsFiles, save_folder, weight_files
from training.bridge import gather
from training.distributed import World
from training.state_files import read_state, write_state
from training.stop import exit_status

MAX_CHECKPOINTS = 2
POSITIONS = "positions.json"


def save(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    positions: dict[str, Any],
    settings: dict[str, Any],
    world: World,
) -> Path:
    """Save a checkpoint: each process's `tensors` are its shards, and the processes' `positions` are merged."""
    path, partial = folder / f"step-{step:08}", folder / f".step-{step:08}"
    if world.is_first:
        _remove_partial(folder)
    streams = world.merge(positions)  # the other processes wait here
    try:
        write_state(partial, tensors, world)
    except (CheckpointError, KeyboardInterrupt):
        if world.is_first:
            shutil.rmtree(partial, ignore_errors=True)  # it may have filled the disk
        raise
    if world.is_first:
        values = {"step": step, "streams": streams, "settings": settings}
        (partial / POSITIONS).write_text(json.dumps(values), encoding="utf-8")
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        for old in list_checkpoints(folder)[:-MAX_CHECKPOINTS]:
            shutil.rmtree(old)
    world.barrier()
    return path


def _remove_partial(folder: Path) -> None:
    """Remove the checkpoints of a process that was killed while it wrote; only the run that has the folder may do so."""
    for partial in folder.glob(".step-*"):
        shutil.rmtree(partial, ignore_errors=True)


def list_checkpoints(folder: Path, suffix: str = "") -> list[Path]:
    """Return the checkpoints, the latest last; those with other names, such as copies, are none."""
    name = re.compile(rf"step-([0-9]+){re.escape(suffix)}")
    steps = {path: int(match[1]) for path in folder.glob("step-*") if (match := name.fullmatch(path.name))}
    return sorted(steps, key=lambda path: steps[path])


def latest(folder: Path, suffix: str = "") -> Path | None:
    return next(reversed(list_checkpoints(folder, suffix)), None)


@contextmanager
def names_continuation(out: Path, suffix: str = "") -> Iterator[None]:
    """End the program after an interrupt or SIGTERM, and say how the run with this folder continues."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        checkpoint = latest(out.expanduser() / "checkpoints", suffix)
        if checkpoint is None:
            print("interrupted before the first checkpoint: the same command starts again", file=sys.stderr)
        else:
            print(f"interrupted: the same command continues from {checkpoint}", file=sys.stderr)
        sys.exit(exit_status(interrupt))


def load_positions(path: Path) -> dict[str, Any]:
    """Return a checkpoint's step, the positions of its streams and, except in old ones, the settings of its run."""
    with names_damage(path):
        positions: dict[str, Any] = json.loads((path / POSITIONS).read_text(encoding="utf-8"))
        positions["step"], positions["streams"] = int(positions["step"]), dict(positions["streams"])
    return positions


@contextmanager
def names_damage(path: Path) -> Iterator[None]:
    """Raise `CheckpointError` for an error that damage of the latest checkpoint causes; it names the one before."""
    try:
        yield
    except (AttributeError, CheckpointError, LookupError, OSError, TypeError, ValueError) as error:
        earlier = [checkpoint.name for checkpoint in list_checkpoints(path.parent, path.suffix) if checkpoint != path]
        instead = f"continue from {earlier[-1]}" if earlier else "start again"
        reason = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else error
        raise CheckpointError(f"{path} is damaged: {reason}; remove it to {instead}") from None


def load_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings of the run whose latest checkpoint is in the folder; None if it has none, or an old one."""
    checkpoint = latest(folder)
    return None if checkpoint is None else load_positions(checkpoint).get("settings")


def load(path: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Load a checkpoint into the tensors, in place; raises `CheckpointError` if it is damaged."""
    with names_damage(path):
        read_state(path, tensors, world)


def collect_tensors(
    named: list[tuple[str, nn.Parameter]], optimizers: Iterable[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """Return parameters and moments under the parameters' names; moments that do not exist yet are created as zeros."""
    moments = {
        parameter: _moments(optimizer, parameter)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    out: dict[str, Tensor] = {}
    for name, parameter in named:
        out[name] = parameter.data
        out |= {f"optimizer.{name}.{part}": value for part, value in moments[parameter].items()}
    return out


def _moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    state = optimizer.state[parameter]
    if not state and isinstance(optimizer, torch.optim.Muon):
        state["momentum_buffer"] = torch.zeros_like(parameter)
    elif not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return state


def gather_weights(model: Flamingo) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight in float32, gathered from its shards; all processes must iterate together."""
    for name, tensor in model.state_dict().items():
        whole = gather(tensor).detach().cpu()
        yield name.replace("_checkpoint_wrapped_module.", ""), whole.float() if whole.is_floating_point() else whole


def restore_stored_weights(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Replace weights that equal the folder's, exactly or in bfloat16, by the folder's, so that formats stay."""
    stored = SafetensorsFiles(weight_files(folder, WEIGHTS))
    for name, tensor in tensors:
        if name in stored and stored.shape(name) == tuple(tensor.shape):
            original = stored[name]
            forms = (original.to(tensor.dtype), original.to(torch.bfloat16).to(tensor.dtype))
            yield name, original if any(torch.equal(form, tensor) for form in forms) else tensor
        else:
            yield name, tensor


def export(
    model: Flamingo,
    tokenizer_json: Path,
    folder: Path,
    world: World,
    name: str,
    files: Mapping[str, str | bytes] = NO_FILES,
) -> None:
    """Write the folder that the server reads, with further text files; it replaces an existing one when it is complete.

    The tokenizer comes from the model folder with which the run began.
    """
    tensors = restore_stored_weights(gather_weights(model), tokenizer_json.parent)
    if not world.is_first:
        for _ in tensors:
            pass
        return
    save_folder(folder, replace(model.config, name=name), tensors, tokenizer_json, files=files, replaces=True)
