"""Which configuration of our kernels a convolution takes, or None where ATen is the faster one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from effseg.expressions.slabs import Window
from effseg.kernels.choose import choose, uses_aten
from effseg.kernels.config import Config
from effseg.kernels.launch import problem


def forward(weight: Tensor, window: Window, size: Sequence[int], prologue: bool = False) -> Config | None:
    """weight: in the type of the products, on the device; size: (D, H, W) of the input."""
    d, h, w = size
    return _choose("conv3d_fwd", weight, window, window.output_size((d, h, w)), prologue)


def dgrad(weight: Tensor, window: Window, size: Sequence[int], epilogue: bool = False) -> Config | None:
    return _choose("conv3d_dgrad", weight, window, tuple(size), epilogue)


def wgrad(weight: Tensor, window: Window, size: Sequence[int], prologue: bool = False) -> Config | None:
    d, h, w = size
    return _choose("conv3d_wgrad", weight, window, window.output_size((d, h, w)), prologue)


def _choose(op: str, weight: Tensor, window: Window, size: tuple[int, ...], prologue: bool) -> Config | None:
    config = choose(
        problem(
            op, weight, in_channels=weight.shape[1], out_channels=weight.shape[0], size=size,
            kernel=window.kernel, stride=window.stride, prologue=prologue,
        )
    )  # fmt: skip
    return None if uses_aten(config) else config
