"""A run's state on disk: bridge, optimizer and every stream's position, by torch.distributed.checkpoint.

A checkpoint arrives whole (it is written beside its place and renamed), any number of processes reads what another
number wrote, and a run that goes on from one has the losses that it would have had. `export` makes the served folder.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from model.checkpoint.native import WEIGHTS, save_folder
from model.checkpoint.tensor_files import SafetensorsFiles, weight_files
from model.flamingo import Flamingo
from training.distributed import World

KEPT = 2
POSITIONS = "positions.json"


def save(folder: Path, step: int, tensors: dict[str, Tensor], positions: dict[str, Any], world: World) -> Path:
    """`tensors` of every process are its parts of the whole; `positions` are merged."""
    place, partial = folder / f"step-{step:08}", folder / f".step-{step:08}"
    everyone = world.merge(positions)
    with _alone_is_meant():
        save_state(tensors, checkpoint_id=partial, no_dist=world.size == 1)
    if world.is_first:
        (partial / POSITIONS).write_text(json.dumps({"step": step, "streams": everyone}), encoding="utf-8")
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
        for old in sorted(folder.glob("step-*"))[:-KEPT]:
            shutil.rmtree(old)
    world.barrier()
    return place


@contextmanager
def _alone_is_meant() -> Iterator[None]:
    """torch warns of a world of one even where it was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def latest(folder: Path) -> Path | None:
    return max(folder.glob("step-*"), default=None)


def load(place: Path, tensors: dict[str, Tensor], world: World) -> dict[str, Any]:
    """Fills the tensors in place; gives back step and positions."""
    with _alone_is_meant():
        load_state(tensors, checkpoint_id=place, no_dist=world.size == 1)
    positions: dict[str, Any] = json.loads((place / POSITIONS).read_text(encoding="utf-8"))
    return positions


def tensors_of(named: list[tuple[str, nn.Parameter]], optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Parameters and moments under the parameters' names; moments that are not there yet are made, as zeros."""
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


def whole_tensors(model: Flamingo) -> Iterator[tuple[str, Tensor]]:
    """Every weight in float32, gathered from wherever it lies: all processes walk through this together."""
    for name, tensor in model.state_dict().items():
        full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        full = full.detach().cpu()
        yield name.replace("_checkpoint_wrapped_module.", ""), full.float() if full.is_floating_point() else full


def as_they_came(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> Iterator[tuple[str, Tensor]]:
    """A weight that is the folder's, but for a cast to bfloat16, as it lies there: what is frozen loses nothing."""
    stored = SafetensorsFiles(weight_files(folder, WEIGHTS))
    for name, tensor in tensors:
        if name in stored and stored.shape(name) == tuple(tensor.shape):
            first = stored[name]
            yield name, first if torch.equal(first.to(torch.bfloat16).to(tensor.dtype), tensor) else tensor
        else:
            yield name, tensor


def export(model: Flamingo, tokenizer_json: Path, folder: Path, world: World) -> None:
    """The folder that the server reads, of the run that began in the tokenizer's folder. One that is there is replaced."""
    tensors = as_they_came(whole_tensors(model), tokenizer_json.parent)
    if not world.is_first:
        for _ in tensors:
            pass
        return
    shutil.rmtree(folder, ignore_errors=True)
    save_folder(folder, model.config, tensors, tokenizer_json)
