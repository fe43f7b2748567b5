"""The device that a command runs on, and how its memory is used again."""

import ctypes
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress

import torch

from effseg.common.settings import Setting
from effseg.errors import InputError

DEVICE_KINDS = ("cpu", "cuda")
_pretended: Setting[str | None] = Setting("effseg_pretended_device", None)


def kind_of(device: torch.device) -> str:
    """`cpu` or `cuda`: what sizes of slabs and chunks are chosen for. Any accelerator is like a GPU of
    NVIDIA's; a fake tensor on the CPU is like the device that it stands for (`pretending`)."""
    return _pretended.get() or ("cpu" if device.type == "cpu" else "cuda")


def pretending(kind: str) -> AbstractContextManager[None]:
    """Inside, sizes are chosen as on a device of this kind, one of DEVICE_KINDS: for fake tensors."""
    return _pretended.set(kind)


def make_room(device: torch.device, *sizes: int) -> None:
    """Let the GPU's allocator hold free pieces of so many bytes each, where it holds no such pieces.

    Otherwise what slabs need for a while would come from the driver tensor by tensor, in pieces too small for
    the next tensor that is kept (`effseg.memory.allocator`). Nothing on a CPU, nor where there is no room.
    """
    if torch.compiler.is_compiling() or kind_of(device) == "cpu":
        return
    with suppress(torch.OutOfMemoryError):
        _ = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]


def find_device(name: str, index: int = 0) -> torch.device:
    """The device called "auto", "cpu", "cuda" or "cuda:N"; `index` is meant where no N is given.

    "auto" is the GPU where there is one. Raises InputError for another name or a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise InputError(f"device: {name} asked for, but torch {torch.__version__} finds no CUDA GPU")
    device = torch.device("cuda", index if device.index is None else device.index)
    if device.index >= torch.cuda.device_count():
        raise InputError(f"device: {device} asked for, but there are {torch.cuda.device_count()} GPUs")
    return device


def keep_freed_memory() -> None:
    """Let this process keep the memory that tensors free on the CPU, for the next ones.

    glibc maps every tensor of 32 MiB or more from the kernel and gives it back when it is freed, so that
    each of its pages is cleared again on the next allocation: half the time of a training step with slabs of
    512 x 512 planes. For programs of their own, which call `trim_freed_memory` once in a while; elsewhere
    than on glibc it does nothing.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # M_TRIM_THRESHOLD, ... of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)  # never
        mallopt(top_pad, 2**26)


def trim_freed_memory() -> None:
    """Give back what `keep_freed_memory` kept: else resident memory creeps up, step by step, by a half."""
    malloc_trim = _glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
