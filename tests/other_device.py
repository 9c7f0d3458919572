"""A second device for tests without a GPU: it computes on the CPU, and refuses operations that mix its tensors with others.

Tensors on `DEVICE` and tensors on the CPU meet by the rules of CUDA: a number of no dimensions on the CPU may join any operation,
indices on the CPU may select from a tensor on the device, copies go both ways, and everything else raises an error.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
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

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """Do nothing: its random numbers come from the CPU."""


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
    """Build tensors and indices from numbers on the CPU: torch builds them below the other mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            lists = [torch.tensor(place, dtype=torch.long) if isinstance(place, list) else place for place in places]
            args = (args[0], tuple(lists) if isinstance(args[1], tuple) else lists[0], *args[2:])
        return func(*args, **kwargs)


def _map(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Return `value` with `function` of each tensor in it."""
    if isinstance(value, torch.Tensor):
        return function(value)
    return type(value)([_map(function, item) for item in value]) if type(value) in (list, tuple) else value


def _call(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    tensors: list[torch.Tensor] = []
    held = lambda tensor: tensor.held if isinstance(tensor, OtherTensor) else tensor  # noqa: E731
    _map(tensors.append, [*args, *kwargs.values()])
    plain_args, plain_kwargs = _map(held, args), {name: _map(held, value) for name, value in kwargs.items()}
    name = func._schema.name
    if kwargs.get("device") is not None:
        is_other = torch.device(kwargs["device"]).type == DEVICE.type
        plain_kwargs["device"] = torch.device("cpu")
    else:
        is_other = isinstance(args[0], OtherTensor) if name in COPIES else any(isinstance(each, OtherTensor) for each in tensors)
    if name not in COPIES:
        _check(name, args, tensors)
    if is_other and kwargs.get("generator") is not None:
        raise RuntimeError(f"{name}: a generator of the CPU for a tensor on {DEVICE}")
    out = func(*plain_args, **plain_kwargs)
    if func._schema.is_mutable and isinstance(out, torch.Tensor):  # in place: the argument itself
        return next(tensor for tensor in tensors if held(tensor) is out)
    return _map(OtherTensor, out) if is_other else out


def _check(name: str, args: tuple[Any, ...], tensors: list[torch.Tensor]) -> None:
    """Raise an error if an operation mixes devices as CUDA would not."""
    if name in INDEXING and isinstance(args[0], OtherTensor):
        tensors = [args[0], *(each for each in args[2:] if isinstance(each, torch.Tensor))]
    mine = [isinstance(tensor, OtherTensor) for tensor in tensors]
    if any(mine) and any(tensor.ndim and not own for tensor, own in zip(tensors, mine, strict=True)):
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
