"""What the tests of a convolution's passes share: inputs, terms, and float64 answers by the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tolerances import assert_rounded, slack, stored
from torch import Tensor

from effseg.expressions.slabs import Window
from effseg.kernels.config import Config
from effseg.kernels.launch import NormAct

# The interpreter's time goes with the number of operations and hardly with their size.
SLIDE = Config("slide", block_d=2, block_h=4, block_w=8, block_n=16)
TAP = Config("tap", block_d=2, block_h=8, block_w=16, block_n=32, block_k=32)
FEW = Config("few", block_d=2, block_h=4, block_w=8, block_n=16, block_k=32)
CUBE = Window((3, 3, 3))


def normal(*shape: int, seed: int = 0, offset: float = 0.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset


def some_terms(samples: int, channels: int, slope: float = 0.01) -> NormAct:
    scale = normal(samples, channels, seed=2).abs() + 0.5
    return NormAct(normal(samples, channels, seed=1) / 2, scale, normal(samples, channels, seed=3) / 4, slope)


def on(terms: NormAct | None, device: torch.device) -> NormAct | None:
    if terms is None:
        return None
    return NormAct(*(t.to(device) for t in terms[:3]), terms.slope)


def norm(y: Tensor, terms: NormAct) -> Tensor:
    """(y - mean) * scale + beta in y's type."""
    mean, scale, beta = (t.to(y)[..., None, None, None] for t in terms[:3])
    return (y - mean) * scale + beta


def activated(y: Tensor, terms: NormAct | None) -> Tensor:
    return y if terms is None else F.leaky_relu(norm(y, terms), terms.slope)


def norm_size(y: Tensor, terms: NormAct) -> Tensor:
    """Absolute terms of `norm`, times what the activation may multiply by."""
    mean, scale, beta = (t.to(y).abs()[..., None, None, None] for t in terms[:3])
    return ((y.abs() + mean) * scale + beta) * max(1.0, terms.slope)


def operand(x: Tensor, terms: NormAct | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What a product takes in place of x: its value, its absolute terms, and by how much it is open."""
    x = x.cpu().double()
    if terms is None:
        value = x.to(dtype).double()
        return value, value.abs(), torch.zeros_like(value)
    size = norm_size(x, terms)
    value, open_by = stored(activated(x, terms), slack(size), dtype)
    return value, size, open_by


def convolution(
    a: Tensor, weight: Tensor, bias: Tensor | None, window: Window, front: int, rows: int
) -> Tensor:
    """The first `rows` output rows, where output row 0 reads rows from -front of a on; differentiable."""
    read = torch.arange(window.stride[0] * (rows - 1) + window.kernel[0]) - front
    exists = ((read >= 0) & (read < a.shape[2])).to(a)[:, None, None]
    padded = a[:, :, read.clamp(0, a.shape[2] - 1)] * exists
    return F.conv3d(padded, weight, bias, window.stride, (0, *window.padding[1:]))


def assert_moments(mean: Tensor, variance: Tensor, values: Tensor) -> None:
    """Of values (N, C, D, H, W) as stored. A mean's rounding is that of the values; the variance meets it in
    every deviation, and squared."""
    values = values.cpu().double()
    space = (2, 3, 4)
    exact_mean, exact = values.mean(space), values.var(space, correction=0)
    of_mean = slack(values.abs().mean(space))
    assert_rounded(mean, exact_mean, of_mean, "mean")
    assert_rounded(
        variance, exact, 2 * slack(exact) + 2 * of_mean * exact.sqrt() + of_mean.square(), "variance"
    )


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN, channels last."""
    return torch.full(shape, torch.nan, dtype=dtype, device=device).contiguous(
        memory_format=torch.channels_last_3d
    )
