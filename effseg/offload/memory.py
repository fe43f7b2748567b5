"""The host's memory that a network keeps tensors in, pinned for a GPU and used again from step to step."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effseg.common.device import kind_of
from effseg.common.settings import Setting
from effseg.common.tensors import storage_use_count
from effseg.errors import InputError

on_host: Setting[bool] = Setting("effseg_on_host", False, lasting=False)
"""Whether what is allocated is memory of the host of the device that a fake tensor on the CPU stands for."""


class _Buffer(NamedTuple):
    """bytes: all of it, uint8; alone: holders of its memory where no tensor lies in it."""

    bytes: Tensor
    alone: int

    @property
    def free(self) -> bool:
        return storage_use_count(self.bytes) == self.alone


class HostMemory:
    """Buffers, as many as there were tensors at a time, each as large as the largest.

    A buffer is free once nothing holds the tensor that lay in it: a graph that is kept for another backward
    pass keeps its own. A copy, also one of another process, begins without any. On a CPU it is ordinary
    memory.
    """

    def __init__(self) -> None:
        self._buffers: list[_Buffer] = []

    def __deepcopy__(self, memo: Any) -> HostMemory:
        return HostMemory()

    def __reduce__(self) -> tuple[type[HostMemory], tuple[()]]:
        return HostMemory, ()

    @property
    def nbytes(self) -> int:
        """Of all buffers."""
        return sum(buffer.bytes.nbytes for buffer in self._buffers)

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """(N, C, D, H, W), channels last, without values, for a tensor of `device`. Raises InputError for
        memory that a GPU cannot have pinned."""
        n, c, d, h, w = shape
        nbytes = prod(shape) * dtype.itemsize
        flat = self._buffer(nbytes, device)[:nbytes].view(dtype)
        return flat.view(n, d, h, w, c).permute(0, 4, 1, 2, 3)

    def _buffer(self, nbytes: int, device: torch.device) -> Tensor:
        free = sorted((b for b in self._buffers if b.free), key=lambda b: b.bytes.nbytes)
        large = [b for b in free if b.bytes.nbytes >= nbytes]
        if large:
            return large[0].bytes
        if free:  # in its place
            self._buffers = [b for b in self._buffers if b is not free[-1]]
            del free
        made = _allocated(nbytes, device)
        self._buffers.append(_Buffer(made, storage_use_count(made)))
        return made


def _allocated(nbytes: int, device: torch.device) -> Tensor:
    if device.type == "cuda":
        return _pinned(nbytes, device)
    with on_host.set(kind_of(device) != "cpu"):
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def _pinned(nbytes: int, device: torch.device) -> Tensor:
    """Pages of their own. torch's own pinned memory comes in powers of two: up to twice as much."""
    try:
        pages = mmap.mmap(-1, nbytes)
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"offload: expected {nbytes} bytes of memory on the host, got {error}") from error
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    runtime: Any = torch.cuda.cudart()
    code = runtime.cudaHostRegister(memory.data_ptr(), nbytes, 0)
    if code != runtime.cudaError.success:
        raise InputError(
            f"offload: expected {nbytes} bytes of the host's memory that CUDA can pin, got CUDA error {code} "
            "(see ulimit -l, and the memory that the host has)"
        )
    weakref.finalize(memory.untyped_storage(), _unpin, memory.data_ptr(), device).atexit = False
    return memory


def _unpin(address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # copies may still be under way
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(address)
