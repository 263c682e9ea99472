"""Writes and reads tensors in torch.distributed.checkpoint's format; its pickle runs no code, and errors have one line.

The library reads `.metadata`, which is a pickle, with `pickle.load`, so a checkpoint of a stranger could run any code. Here
only the classes that the library writes there are permitted, and only files of the checkpoint; anything else makes the
checkpoint a damaged one.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from model.folder import CheckpointError
from training.distributed import World

_LIBRARY = "torch.distributed.checkpoint"
# everything that the metadata of float32 tensors names
PERMITTED = {
    *((f"{_LIBRARY}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *(
        (f"{_LIBRARY}.metadata", name)
        for name in ("TensorStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")
    ),
    (f"{_LIBRARY}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch", "float32"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # its name in Python 3.13
}

# the name of a file with tensors
DATA_FILE = re.compile(r"[\w-]+\.distcp", re.ASCII)


class _MetadataUnpickler(pickle._Unpickler):  # in Python, whose operations can be replaced
    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PERMITTED:
            raise pickle.UnpicklingError(f"its metadata names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Set attributes of a dataclass's instance: those of a class would change it for the whole process."""
        if isinstance(self.stack[-2], type) or not is_dataclass(self.stack[-2]):
            raise pickle.UnpicklingError("its metadata changes a class or a function")
        super().load_build()  # type: ignore[misc]  # the types leave it out

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}


class _Reader(FileSystemReader):
    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def _read_metadata(folder: Path) -> Metadata:
    try:
        with (folder / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        paths = [str(info.relative_path) for info in metadata.storage_data.values()]
    except Exception as error:  # unpickling may raise anything
        raise CheckpointError(first_line(error)) from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError("its metadata is of another kind")
    if foreign := [path for path in paths if not DATA_FILE.fullmatch(path)]:
        raise CheckpointError(f"its metadata names the file {foreign[0]!r:.60}, which is none of a checkpoint")
    return metadata


def first_line(error: BaseException) -> str:
    """Return the first line of the error, or of the operating system's error that led to it: the disk is full."""
    cause = _cause(error)
    return next(iter(str(cause).splitlines()), type(cause).__name__)


def write_state(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Write each process's `tensors` as its shards; raises `CheckpointError`, for example if the disk is full."""
    with _one_line(f"{folder} cannot be written: "):
        save(tensors, checkpoint_id=folder, no_dist=world.size == 1)


def read_state(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Read into the tensors, in place; raises `CheckpointError` for files that are missing, damaged or of other tensors."""
    metadata = _read_metadata(folder)  # before the library reads it, which logs tracebacks of errors there
    with _one_line():
        load(tensors, storage_reader=_Reader(folder, metadata), no_dist=world.size == 1)


@contextmanager
def _one_line(prefix: str = "") -> Iterator[None]:
    """Raise the library's error, which has a traceback per process, as a `CheckpointError` with the first process's reason.

    A warning about a single process, which is intended here, is suppressed.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except CheckpointException as error:
        reason = next(reason for reason, _ in error.failures.values())
        if isinstance(reason, KeyboardInterrupt):  # the library wraps it like a failure
            raise reason from None
        raise CheckpointError(prefix + first_line(reason)) from None


def _cause(error: BaseException) -> BaseException:
    """Return the operating system's error that led to this one, if there is one: it says that the disk is full."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause or error
