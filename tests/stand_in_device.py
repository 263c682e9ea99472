"""A stand-in for a GPU that counts what the host waits for: its tensors have their data in host memory.

To the code under test they are on the device "meta", and nothing but a copy brings their values to the host. The rules are
those of CUDA: the host waits for each value that it reads, for indices that are lists or host tensors, for masks as
indices, and for every copy, except one from or to pinned memory that is not blocking. The values of such a copy to the host
are there when the host has waited for an event after it. The order of the work on streams is checked (`device_order`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.device_order import Order

aten = torch.ops.aten
DEVICE = torch.device("meta")
COPIES = {aten.to, aten._to_copy, aten.copy_}
INDEXING = {aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_}
# operators whose result, or its size, the host has to know
READING = {aten.item, aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select}
READING |= {aten.repeat_interleave, aten.allclose, aten.unique_dim, aten._unique2}


class DeviceTensor(Tensor):
    """A tensor of the stand-in device; `content` has its values."""

    content: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> DeviceTensor:
        tensor: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        tensor.content = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"{func} outside of `stand_in_device`")


def on_host(value: Any) -> Any:
    """Return a value, or what a tree holds, with the content of its tensors in place of the tensors."""
    return tree_map(lambda leaf: leaf.content if isinstance(leaf, DeviceTensor) else leaf, value)


def on_device(value: Any) -> Any:
    return tree_map(lambda leaf: DeviceTensor(leaf) if type(leaf) is Tensor else leaf, value)


class Waits(list[str]):
    """A list of what the host has waited for so far."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: set[int] = set()  # the addresses of pinned memory
        self.num_uploads = 0  # copies to the device that the host does not wait for
        self.order = Order()

    def computed_on_host(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of tensors of the device that stands for kernels which the host does not wait for."""

        def compute(*arguments: Any) -> Any:
            contents = on_host(arguments)
            results = function(*contents)
            self.order.launch(_tensors(contents), results=_tensors(results))
            return on_device(results)

        return compute


class _Operators(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves, packet = tree_leaves((args, kwargs)), func.overloadpacket
        target = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        are_on_device = [isinstance(tensor, DeviceTensor) for tensor in tensors]
        if packet in COPIES:
            self._note_copy(func, args, kwargs, target)
        elif any(are_on_device):
            self._note_use(func, tensors, are_on_device)
        is_pinned = kwargs.pop("pin_memory", False)
        host_args, host_kwargs = tree_map(_to_host, (args, kwargs))
        alias = func._schema.arguments[0].alias_info if func._schema.arguments else None
        writes = alias is not None and alias.is_write
        contents = [tensor.content for tensor in tensors if isinstance(tensor, DeviceTensor)]
        if writes and self._is_async_copy_to_host(func, args):
            self._waits.order.launch(contents)
            self._waits.order.download(args[0], contents[0])
            return args[0]
        result = func(*host_args, **host_kwargs)
        if is_pinned:
            self._waits.pinned.add(result.untyped_storage().data_ptr())
        is_result_on_device = target.type == DEVICE.type if target is not None else any(are_on_device)
        if contents or is_result_on_device:
            written = contents[:1] if writes and are_on_device[0] else []
            if written and packet in INDEXING and len(host_args[1]) == 1:
                written = [contents[0][index] for index in host_args[1][0].tolist()]
                contents = contents[1:]
            self._waits.order.launch(contents, written, _tensors(result) if is_result_on_device and not writes else [])
        if writes:
            return args[0]
        return on_device(result) if is_result_on_device else result

    def _is_async_copy_to_host(self, func: Any, args: Any) -> bool:
        is_copy = func.overloadpacket is aten.copy_ and not isinstance(args[0], DeviceTensor)
        return is_copy and isinstance(args[1], DeviceTensor) and args[-1] is True and self._is_pinned(args[0])

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._waits.pinned

    def _note_copy(self, func: Any, args: Any, kwargs: Any, target: torch.device | None) -> None:
        source, begins_on_device = args[0], isinstance(args[0], DeviceTensor)
        ends_on_device = begins_on_device if target is None else target.type == DEVICE.type
        if func.overloadpacket is aten.copy_:
            source, begins_on_device, ends_on_device = args[1], isinstance(args[1], DeviceTensor), begins_on_device
        if begins_on_device == ends_on_device or (ends_on_device and not source.dim()):
            return
        is_async = kwargs.get("non_blocking", False) or any(argument is True for argument in args)
        if is_async and not begins_on_device and self._is_pinned(source):
            self._waits.num_uploads += 1
            self._waits.order.upload(source)
        elif not self._is_async_copy_to_host(func, args):
            self._waits.append(f"copy to the {'device' if ends_on_device else 'host'}")
            self._waits.order.synchronize(self._waits.order.current.point())

    def _note_use(self, func: Any, tensors: list[Tensor], are_on_device: list[bool]) -> None:
        packet = func.overloadpacket
        is_mask = packet in INDEXING and any(t.dtype == torch.bool for t in tensors[1:] if t.dim())
        if packet in READING or is_mask:
            self._waits.append(str(packet))
        elif any(tensor.dim() and not here for tensor, here in zip(tensors, are_on_device, strict=True)):
            assert packet in INDEXING, f"{func} of tensors on two devices"
            self._waits.append(f"{packet} with indices on the host")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _to_host(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    return leaf.content if isinstance(leaf, DeviceTensor) else leaf


class _Calls(TorchFunctionMode):
    """Counts the calls that do more than the operators in them show."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            self._waits.append("tensor of a list")
            return self._copied(torch.tensor(*args, **{**kwargs, "device": "cpu"}))
        if func is Tensor.pin_memory:
            copied = args[0].clone()
            self._waits.pinned.add(copied.untyped_storage().data_ptr())
            return copied
        if args and isinstance(args[0], DeviceTensor):
            if func is Tensor.tolist:
                return args[0].cpu().tolist()
            if func in (Tensor.__getitem__, Tensor.__setitem__):
                args = (args[0], self._without_lists(args[1]), *args[2:])
        return func(*args, **kwargs)

    def _without_lists(self, index: Any) -> Any:
        if isinstance(index, tuple):
            return tuple(self._without_lists(part) for part in index)
        if not isinstance(index, list):
            return index
        self._waits.append("index of a list")
        return self._copied(torch.tensor(index))

    def _copied(self, values: Tensor) -> Tensor:
        self._waits.order.launch([], results=[values])
        return DeviceTensor(values)


@contextmanager
def stand_in_device() -> Iterator[Waits]:
    """Run a block with the device "meta" as the stand-in; the list has what the host waits for in it."""
    waits = Waits()
    with waits.order.in_place_of_cuda(waits), _Calls(waits), _Operators(waits):
        yield waits
