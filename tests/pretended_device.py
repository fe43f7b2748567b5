"""A pretended GPU: torch's PrivateUse1 with hooks in Python, on fake tensors.

Fake tensors refuse operators whose tensors are on two devices, and the autograd engine runs what belongs to
the device in a thread of its own, as it does for CUDA: the two things that no test on the CPU shows. There
is no memory and no number. Autocast casts nothing by itself here: operators of effseg read it, torch's do
not follow it.

torch can rename PrivateUse1 once a process, and the process then believes that it has an accelerator. So
tests on the device are in a file of their own, which `test_pretended_device.py` runs in another process.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import effseg
from effseg.common.settings import Function, Setting
from effseg.offload.memory import on_host

M = TypeVar("M", bound=nn.Module)
DEVICE = "gpu"
PACKAGE = str(Path(effseg.__file__).parent)
SMALL = 48
"""Elements of a tensor that may be on the CPU: tables and scalars that a step makes there and hands over."""


def missing() -> str | None:
    """Why this torch cannot pretend, if so."""
    needed = [(backend_registration, "_setup_privateuseone_for_python_backend"), (torch._C, "_acc")]
    lost = [name for module, name in needed if not hasattr(module, name)]
    return f"torch {torch.__version__} lacks {', '.join(lost)}" if lost else None


@cache
def register() -> None:
    """Change what this process's torch takes for its accelerator: see above."""

    class Device(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.float16, torch.bfloat16]

        def get_device_name(self, device: Any = None) -> str:
            return "NVIDIA H200"

    backend_registration._setup_privateuseone_for_python_backend(DEVICE, backend_module=Device())
    fallback = torch.library.Library("_", "IMPL")
    fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    # What torch implements for real devices alone.
    meta = torch.library.Library("aten", "IMPL", "Meta")
    meta.impl("batch_norm_update_stats", _batch_norm_update_stats)
    torch.Tensor.new_tensor = _new_tensor  # type: ignore[method-assign]
    _registered.extend((fallback, meta))


_registered: list[torch.library.Library] = []  # they end with their last reference


def _batch_norm_update_stats(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[1], dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)


def _new_tensor(self: torch.Tensor, data: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.full((), data, dtype=dtype or self.dtype, device=self.device)


class Watch(TorchDispatchMode):
    """Every operator of a step: none may get or give a tensor of some size that is not on the device, but for
    views of memory of the host.

    expected: values of settings that operators in the backward of effseg's own nodes should see; lost: names
    of those that one did not see; nodes: of which nodes operators were seen; threads: in which.
    """

    def __init__(self, expected: Mapping[Setting[Any], Any] | None = None) -> None:
        super().__init__()
        self.expected = expected or {}
        self.lost: set[str] = set()
        self.nodes: set[str] = set()
        self.threads: set[threading.Thread] = set()
        self.host: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if on_host.get():
            self.host.update(_memory(out))
        if self.host.issuperset(_memory((args, kwargs, out))):
            return out
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != DEVICE and tensor.numel() > SMALL:
                raise AssertionError(f"{func}: {tuple(tensor.shape)} on {tensor.device}")
        node: Any = torch._C._current_autograd_node()
        if node is not None:
            self.threads.add(threading.current_thread())
            if node.name() in own_nodes() and _in_effseg():
                self.nodes.add(node.name())
                self.lost.update(s.name for s, value in self.expected.items() if s.get() is not value)
        return out


def _memory(tree: Any) -> list[int]:
    """That of all tensors, by its address in torch."""
    return [t.untyped_storage()._cdata for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _in_effseg() -> bool:
    """Whether its code is on the stack: the autograd engine adds gradients up by itself."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            return True
        frame = frame.f_back
    return False


class _Forget(TorchDispatchMode):
    """Fake tensors made of a few numbers remember them, and torch computes with those: not on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, FakeTensor)]
        target = (kwargs or {}).get("device")
        if any(t.device.type == DEVICE for t in given) or (target and torch.device(target).type == DEVICE):
            for tensor in given:
                tensor.constant = None
        return func(*args, **(kwargs or {}))


@cache
def own_nodes() -> frozenset[str]:
    """Names of effseg's nodes in a graph."""
    return frozenset(f"{function.__name__}Backward" for function in Function.__subclasses__())


@contextmanager
def pretended() -> Iterator[None]:
    """Inside, tensors are fake, and may be on `DEVICE`."""
    register()
    with FakeTensorMode(allow_non_fake_inputs=False), _Forget():
        yield


def on_device(module: M) -> M:
    """The module with parameters and buffers on the device; its own `to` cannot move fake ones."""
    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None:
                moved = torch.empty_like(tensor, device=DEVICE)
                part._parameters[name] = nn.Parameter(moved, tensor.requires_grad)
        for name, tensor in part._buffers.items():
            if tensor is not None:
                part._buffers[name] = torch.empty_like(tensor, device=DEVICE)
    return module
