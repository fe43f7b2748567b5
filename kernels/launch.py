"""How host wrappers start kernels, and what they agree on about tensors.

Features are (N, C, D, H, W) with channels last in memory: strides (any, 1, H W C, W C, C), so that a plane of
D is contiguous and rows [lo, hi) of one sample are a view that a kernel takes as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from effseg.kernels.config import DTYPES as DTYPE_NAMES
from effseg.kernels.config import INTERPRETER, Problem, gpu_slug
from effseg.settings import Setting

CHANNELS_LAST = torch.channels_last_3d
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    """kernel[grid](*args, **options). Fake tensors, which have shapes and no memory, are left as they are."""
    options["enable_fp_fusion"] = True
    if (recorded := _recording.get()) is not None:
        recorded.launches.append(Launch(kernel, tuple(grid), args, options))
        return
    if any(isinstance(arg, FakeTensor) for arg in args) or min(grid) == 0:
        return
    kernel[tuple(grid)](*args, **options)


def interpreted() -> bool:
    """Whether kernels run in Triton's CPU interpreter (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def architecture(device: torch.device) -> str:
    """ "sm_90" and the like; INTERPRETER off the GPU."""
    if (recorded := _recording.get()) is not None:
        return recorded.target
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def dtype_name(dtype: torch.dtype) -> str:
    """fp32, bf16 or fp16, as in `config.Problem`."""
    return dict(zip(DTYPES, DTYPE_NAMES, strict=True))[dtype]


def problem(op: str, x: Tensor, **others: Any) -> Problem:
    """What `config.choose` is asked of an operator that tiles x (N, C, D, H, W); `others` override."""
    gpu = gpu_slug(torch.cuda.get_device_name(x.device)) if x.device.type == "cuda" else ""
    given: dict[str, Any] = {
        "in_channels": x.shape[1],
        "out_channels": x.shape[1],
        "size": tuple(x.shape[2:]),
    }
    return Problem(op, architecture(x.device), dtype_name(x.dtype), gpu=gpu, **(given | others))


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
