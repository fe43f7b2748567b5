"""How host wrappers start kernels, and what they agree on about tensors.

Features are (N, C, D, H, W) with channels last in memory: strides (a multiple of C, 1, H W C, W C, C), so
that a plane of D is contiguous and rows [lo, hi) of one sample are a view that a kernel takes as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from effseg.common.formats import CHANNELS_LAST
from effseg.common.settings import Setting
from effseg.kernels import device as gpus
from effseg.kernels.config import DTYPES as DTYPE_NAMES
from effseg.kernels.config import INTERPRETER, Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = dict(zip(DTYPES, DTYPE_NAMES, strict=True))


class NormAct(NamedTuple):
    """leaky_relu((y - mean) * scale + beta, slope) of a raw convolution output y; (N, C) float32 terms."""

    mean: Tensor
    scale: Tensor
    beta: Tensor
    slope: float


class Launch(NamedTuple):
    """A kernel as it would have been started."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


class _Recording(NamedTuple):
    target: str
    launches: list[Launch]


_recording: Setting[_Recording | None] = Setting("effseg_recording", None)


@contextmanager
def recording(target: str) -> Iterator[list[Launch]]:
    """Inside, `architecture` answers with the target ("sm_90") and kernels are listed instead of started."""
    launches: list[Launch] = []
    with _recording.set(_Recording(target, launches)):
        yield launches


def launch(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options), on the GPU where its tensors are, be that the current one or not.

    Fake tensors, which have shapes and no memory, are left as they are.
    """
    options["enable_fp_fusion"] = True
    if (recorded := _recording.get()) is not None:
        recorded.launches.append(Launch(kernel, tuple(grid), args, options))
        return
    if any(isinstance(arg, FakeTensor) for arg in args) or min(grid) == 0:
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    # Triton takes the current GPU, and its stream; changing it takes longer than seeing that it is the one.
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[tuple(grid)](*args, **options)
    else:
        kernel[tuple(grid)](*args, **options)


def interpreted() -> bool:
    """Whether kernels run in Triton's CPU interpreter (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def architecture(device: torch.device) -> str:
    """ "sm_90" and the like; INTERPRETER off the GPU."""
    if (recorded := _recording.get()) is not None:
        return recorded.target
    return gpus.capability(device) if device.type == "cuda" else INTERPRETER


def dtype_name(dtype: torch.dtype) -> str:
    """fp32, bf16 or fp16, as in `config.Problem`."""
    return _NAMES[dtype]


def problem(op: str, x: Tensor, **others: Any) -> Problem:
    """What `choose` is asked of an operator that tiles x (N, C, D, H, W); `others` override."""
    given: dict[str, Any] = {
        "in_channels": x.shape[1],
        "out_channels": x.shape[1],
        "size": tuple(x.shape[2:]),
    }
    device = x.device
    if device.type == "cuda":
        given |= {"gpu": gpus.gpu(device), "multiprocessors": gpus.multiprocessors(device)}
    return Problem(op, architecture(device), dtype_name(x.dtype), **(given | others))


def channels_last(x: Tensor) -> Tensor:
    """x itself where its strides are as above, else a copy that has them. Raises `ValueError` for planes of
    more elements than 32 bits count."""
    n, c, d, h, w = x.shape
    plane = h * w * c
    if plane >= 2**31:
        raise ValueError(f"expected planes of fewer than 2^31 elements, got {c} x {h} x {w}")
    sample, channel, row, line, voxel = x.stride()
    same = (
        (channel == 1 or c == 1)
        and (voxel == c or w == 1)
        and (line == w * c or h == 1)
        and (row == plane or d == 1)
        and (n == 1 or sample % c == 0)
    )
    return x if same else x.contiguous(memory_format=CHANNELS_LAST)


def sample_stride(x: Tensor | None) -> int:
    """Voxels between the samples of what is `channels_last`; 0 where there is one, or no tensor."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0) // x.shape[1]


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised features, channels last."""
    return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=CHANNELS_LAST)


def input_precision(dtype: torch.dtype) -> str:
    """`tl.dot`'s: float32 follows torch's switch for convolutions, torch.backends.cudnn.allow_tf32."""
    if dtype == torch.float32 and not torch.backends.cudnn.allow_tf32:
        return "ieee"
    return "tf32"
