"""Tensors that are said to be on another device, and computed on the CPU.

A GPU's operations refuse tensors of two devices. On a machine without one a forgotten `.to(device)` goes unseen; here
it raises as it would there. `with other_device():` makes `DEVICE` usable: what is made on it or moved to it is a tensor
that holds one of the CPU's and lets none of the CPU's beside it.

It stands in for a GPU in one respect only, where tensors are. Nothing is said about kernels, types or memory. With
VISFT_TEST_DEVICE=cuda in the environment, `DEVICE` is a real GPU instead; tests that count waits need the stand-in.
"""

import contextlib
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # imported late, within an optimizer, it would find the Generator below
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

import visft

# A type of device that needs no driver, and whose backward pass runs in the calling thread.
DEVICE = torch.device(os.environ.get("VISFT_TEST_DEVICE", "lazy"))

_aten = torch.ops.aten
_MOVES = {_aten._to_copy.default, _aten.copy_.default}
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_JOINING = {_aten.cat.default, _aten.stack.default}
_READS = {_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default}
_SIZED_BY_VALUES = {
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.repeat_interleave.Tensor,
}

_PACKAGE = Path(visft.__file__).parent

waits: list[str] = []
"""Where the program waited for the device: it read a value, or made a tensor whose size depends on values."""


class Elsewhere(torch.Tensor):
    """A tensor on `DEVICE`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Elsewhere":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    involved = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    if not involved and kwargs.get("device") is None:
        return func(*args, **kwargs)
    _check(func, args, tensors)
    if func is _aten.copy_.default:
        there = isinstance(args[0], Elsewhere)
    elif kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]) == DEVICE
    else:
        there = True
    here = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
    if "device" in kwargs:
        here["device"] = torch.device("cpu")
    if involved and _waits(func, args, there):
        _note(str(func))
    held_args, held_kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.held, (args, here))
    result = func(*held_args, **held_kwargs)
    if not there:
        return result
    result = tree_map_only(torch.Tensor, Elsewhere, result)
    return return_and_correct_aliasing(func, args, kwargs, result)


def _waits(func, args, there: bool) -> bool:
    if func in _INDEXING:
        return any(isinstance(part, Elsewhere) and part.dtype == torch.bool for part in args[1])
    return func in _READS | _SIZED_BY_VALUES or (func in _MOVES and not there)


def _note(what: str) -> None:
    own = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(_PACKAGE)]
    waits.append(f"{what}, {Path(own[-1].filename).name}:{own[-1].lineno}" if own else what)


def _check(func, args, tensors: list[torch.Tensor]) -> None:
    """Refuse what a GPU refuses: another device's tensors, but for numbers (0-dimensional, on the CPU) and indices."""
    if func in _MOVES:
        return
    if func in _INDEXING and isinstance(args[0], Elsewhere):
        tensors = [part for part in (args[0], *args[2:3]) if isinstance(part, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    here = [t for t in tensors if not isinstance(t, Elsewhere) and (t.ndim or func in _JOINING)]
    if there and here:
        shapes = [[tuple(tensor.shape) for tensor in side] for side in (there, here)]
        raise RuntimeError(
            f"{func}: expected all tensors on one device: {shapes[0]} on {DEVICE}, {shapes[1]} on cpu"
        )


class _Operations(TorchDispatchMode):
    """Those that make tensors on `DEVICE`, or move them there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What torch does before any operation that the mode above would see: tensors from Python's numbers, and back."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.tolist and isinstance(args[0], Elsewhere):
            _note("tolist")
            return args[0].held.detach().tolist()
        if func is torch.Tensor.new_tensor:
            device = kwargs.pop("device", args[0].device)
            return torch.tensor(*args[1:], **({"dtype": args[0].dtype} | kwargs)).to(device)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func in (torch.Tensor.__setitem__, torch.Tensor.__getitem__) and isinstance(args[0], Elsewhere):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(part) if isinstance(part, list) else part for part in index)
            values = (
                value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=args[0].dtype)
                for value in args[2:]
            )
            return func(args[0], index, *values)
        return func(*args, **kwargs)


@contextlib.contextmanager
def other_device() -> Iterator[torch.device]:
    """Gives `DEVICE`, which can be used within."""
    if DEVICE.type != "lazy":
        yield DEVICE
        return
    generator, enabled, autocast = torch.Generator, torch.is_autocast_enabled, torch.autocast

    def is_autocast_enabled(*device_type):
        return enabled(*device_type) if device_type != (DEVICE.type,) else False

    def no_autocast(device_type, *args, **kwargs):
        kind = autocast if device_type != DEVICE.type else lambda *args, **kwargs: contextlib.nullcontext()
        return kind(device_type, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for name, value in {
            "Generator": lambda device="cpu": generator("cpu"),
            "is_autocast_enabled": is_autocast_enabled,
            "autocast": no_autocast,
        }.items():
            stack.enter_context(mock.patch.object(torch, name, value))
        # torch.utils.checkpoint asks for the module of the device's random generators.
        stack.enter_context(mock.patch.object(torch, DEVICE.type, torch.cpu, create=True))
        stack.enter_context(_Functions())
        stack.enter_context(_Operations())
        yield DEVICE
