"""How host wrappers start kernels, and what they agree on about tensors.

Features are (N, C, D, H, W) with channels last in memory: strides (any, 1, H W C, W C, C), so that a plane of
D is contiguous and rows [lo, hi) of one sample are a view that a kernel takes as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from effseg.kernels.config import INTERPRETER

CHANNELS_LAST = torch.channels_last_3d
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class NormAct(NamedTuple):
    """leaky_relu((y - mean) * scale + beta, slope) of a raw convolution output y; (N, C) float32 terms."""

    mean: Tensor
    scale: Tensor
    beta: Tensor
    slope: float


def launch(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options). Fake tensors, which have shapes and no memory, are left as they are."""
    if any(isinstance(arg, FakeTensor) for arg in args) or min(grid) == 0:
        return
    kernel[tuple(grid)](*args, enable_fp_fusion=True, **options)


def interpreted() -> bool:
    """Whether kernels run in Triton's CPU interpreter (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def architecture(device: torch.device) -> str:
    """ "sm_90" and the like; INTERPRETER off the GPU."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def channels_last(x: Tensor) -> Tensor:
    """x itself where its strides are as above (of any sample stride), else a copy that has them."""
    _, c, _, h, w = x.shape
    strides = (1, h * w * c, w * c, c)
    same = all(
        size == 1 or got == want for size, got, want in zip(x.shape[1:], x.stride()[1:], strides, strict=True)
    )
    return x if same else x.contiguous(memory_format=CHANNELS_LAST)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised features, channels last."""
    return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=CHANNELS_LAST)


def input_precision(dtype: torch.dtype) -> str:
    """`tl.dot`'s: float32 follows torch's switch for convolutions, torch.backends.cudnn.allow_tf32."""
    if dtype == torch.float32 and not torch.backends.cudnn.allow_tf32:
        return "ieee"
    return "tf32"
