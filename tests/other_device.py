"""A second device for tests without a GPU: it computes on the CPU, and refuses operations that mix its tensors with others.

Tensors on `DEVICE` and tensors on the CPU meet by the rules of CUDA: a number of no dimensions on the CPU may join any operation,
indices on the CPU may select from a tensor on the device, copies go both ways, and everything else raises an error.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyDeviceGuard

DEVICE = torch.device("privateuseone:0")
COPIES = {"aten::copy_", "aten::_to_copy", "aten::set_.source_Tensor", "aten::lift_fresh"}
INDEXING = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}


class _Backend:
    """What torch asks a device's module."""

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False


class OtherTensor(torch.Tensor):
    """A tensor on `DEVICE`; `held` holds its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OtherTensor":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=DEVICE, **layout)
        wrapper.held = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, **_: object) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"OtherTensor({self.held})"


class _OtherDevice(TorchDispatchMode):
    """Make tensors on `DEVICE` where one is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _Constructors(TorchFunctionMode):
    """Build tensors from numbers on the CPU and move them: torch builds them below the other mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return func(*args, **kwargs)


def _call(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    name = func._schema.name
    if kwargs.get("device") is not None:
        on_device = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    else:
        on_device = isinstance(args[0] if name in COPIES else _first(tensors), OtherTensor)
    if name not in COPIES:
        _check(name, args, tensors)
    if on_device and kwargs.get("generator") is not None:
        raise RuntimeError(f"{name}: a generator of the CPU for a tensor on {DEVICE}")
    plain_args, plain_kwargs = pytree.tree_map_only(OtherTensor, lambda tensor: tensor.held, (args, dict(kwargs)))
    out = func(*plain_args, **plain_kwargs)
    if func._schema.is_mutable and isinstance(out, torch.Tensor):  # in place: the argument itself
        return next(tensor for tensor in tensors if (tensor.held if isinstance(tensor, OtherTensor) else tensor) is out)
    wrap = OtherTensor if on_device else lambda tensor: tensor
    return pytree.tree_map_only(torch.Tensor, lambda tensor: wrap(tensor), out)


def _first(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    return next((tensor for tensor in tensors if isinstance(tensor, OtherTensor)), None)


def _check(name: str, args: tuple[Any, ...], tensors: list[torch.Tensor]) -> None:
    """Raise an error if an operation mixes devices as CUDA would not."""
    mine = [isinstance(tensor, OtherTensor) for tensor in tensors]
    if all(mine) or not any(mine):
        return
    if name in INDEXING and isinstance(args[0], OtherTensor):
        tensors = [args[0], *(leaf for leaf in pytree.tree_leaves(args[2:]) if isinstance(leaf, torch.Tensor))]
    if any(tensor.ndim and not isinstance(tensor, OtherTensor) for tensor in tensors):
        shapes = [f"{[*tensor.shape]} on {tensor.device}" for tensor in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} of {', '.join(shapes)}")


@contextmanager
def other_device() -> Iterator[torch.device]:
    """Within the block, tensors and modules can be moved to the device that is returned."""
    if not hasattr(torch, DEVICE.type):
        torch._register_device_module(DEVICE.type, _Backend)
        torch._C._acc.register_python_privateuseone_device_guard(_DummyDeviceGuard())  # pyright: ignore
    with _Constructors(), _OtherDevice():
        yield DEVICE
