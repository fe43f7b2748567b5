"""The one table of tolerances, and the rule for low precision."""

import torch
from torch import Tensor

EXACT = 1e-9
"""Relative error against float64 torch when computed in float64."""

ATOL = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}
"""What is added to twice torch's own error, relative to the norm of the result."""


def relative_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||; NaN and inf never pass."""
    got, expected = got.detach().double(), expected.detach().double()
    error = (got - expected).norm() / expected.norm().clamp_min(1e-30)
    return float(error) if bool(torch.isfinite(error)) else float("inf")


def assert_exact(got: Tensor, expected: Tensor, what: str = "") -> None:
    assert got.shape == expected.shape
    assert relative_error(got, expected) <= EXACT, what


def assert_no_worse_than_torch(ours: Tensor, torchs: Tensor, exact: Tensor, what: str = "") -> None:
    """Our error against float64 is at most twice torch's own in the same dtype, plus a small constant."""
    assert ours.dtype == torchs.dtype, what
    own, theirs = relative_error(ours, exact), relative_error(torchs, exact)
    assert own <= 2 * theirs + ATOL[ours.dtype], f"{what}: ours {own:.2e}, torch's {theirs:.2e}"
