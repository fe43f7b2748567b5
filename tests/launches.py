"""Counts what the host does in a training step on a GPU.

Run as ``python launches.py 512x512x256 stream 24GB``, or for several modes ``raw,stream``. torch's
PrivateUse1 stands for the GPU, on fake tensors: shapes, types and devices without memory and without numbers.
torch can rename it once a process, and the process then believes that it has an accelerator: so this runs in
one of its own. Prints JSON by mode: `launching`, operators that launch a kernel (views and allocations do
not); `views`; `syncs`, operators for which the host waits or sends a number, each with its place in effseg.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import effseg
from effseg.memory.choice import Choice, first_that_fits, usable
from effseg.models.effsegnet import EffSegNet
from effseg.models.training_step import TrainingStep

DEVICE = "gpu"
PACKAGE = str(Path(effseg.__file__).parent)
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# Whose results the host reads, or whose sizes it has to know.
READ = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "bincount")
libraries: list[torch.library.Library] = []  # they end with their last reference


class HostWork(TorchDispatchMode):
    """Counts operators whose tensors are on DEVICE."""

    def __init__(self) -> None:
        super().__init__()
        self.launching: Counter[str] = Counter()
        self.views = 0
        self.syncs: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, got = (
            [t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in ((args, kwargs), out)
        )
        for tensor in (*given, *got):
            # A fake tensor made of a few numbers remembers them, and torch computes with those.
            tensor.constant = None
        devices = {tensor.device.type for tensor in (*given, *got)}
        if DEVICE not in devices or func is torch.ops.prim.device.default:
            return out
        name = func._schema.name.removeprefix("aten::")
        if name in READ or len(devices) > 1:
            self.syncs.append(f"{func} {place()}")
        if func.is_view or name in (*ALLOCATIONS, "_unsafe_view", "lift_fresh"):
            self.views += 1
        else:
            self.launching[str(func)] += 1
        return out


def place() -> str:
    """The innermost line of effseg that runs."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}"


def register() -> None:
    class Device(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.float16, torch.bfloat16]

    backend_registration._setup_privateuseone_for_python_backend(DEVICE, backend_module=Device())
    fallback = torch.library.Library("_", "IMPL")
    fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    meta = torch.library.Library("aten", "IMPL", "Meta")
    meta.impl("batch_norm_update_stats", _batch_norm_update_stats)
    libraries.extend((fallback, meta))


def _batch_norm_update_stats(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[1], dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)


def on_device(model: nn.Module) -> nn.Module:
    for part in model.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(tensor, device=DEVICE))
    return model


def chosen(memory: str, size: tuple[int, ...], gpu_memory: str) -> Choice:
    """What the planner chooses for a card of so much memory, of the candidates in this mode."""
    arguments = {"in_channels": 1, "num_classes": 15, "preset": "base"}
    step = TrainingStep.of(EffSegNet, arguments, (1, 1, *size), "bf16")
    return first_that_fits(step, step.candidates(memory), usable(gpu_memory, torch.device("cuda")))


def count(size: tuple[int, ...], memory: str, gpu_memory: str | None = None) -> HostWork:
    """A step of `base` with 15 classes in bf16, by default with the slabs that follow from the size."""
    model = effseg.EffSegNet(1, 15, memory=memory)
    if gpu_memory is not None:
        found = chosen(memory, size, gpu_memory)
        assert found.memory == memory
        model.use(found.settings, found.slab_elements)
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_device(model)
        image = torch.empty(1, 1, *size, device=DEVICE)
        labels = torch.empty(1, *size, dtype=torch.uint8, device=DEVICE)
        with HostWork() as work:
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = model.loss(image, labels)
            loss.backward()
    return work


if __name__ == "__main__":
    size, modes, *gpu_memory = sys.argv[1:]
    register()  # before the first backward pass, even that of a prediction
    found = {}
    for memory in modes.split(","):
        work = count(tuple(map(int, size.split("x"))), memory, *gpu_memory)
        found[memory] = {
            "launching": work.launching.total(),
            "views": work.views,
            "syncs": work.syncs,
            "often": dict(work.launching.most_common(12)),
        }
    print(json.dumps(found), flush=True)
    # Autograd's thread of the pretended device has no end of its own: now and then its destructor, at the
    # process's regular end, is told so by std::terminate.
    os._exit(0)
