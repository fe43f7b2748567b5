"""How far a result may be from the exact one: what its arithmetic allows, on whatever machine.

In float64 `EXACT` is far above any rounding. Below it there are three rules. None of them asks how close
another implementation came by luck, and each still refuses a thousandth too much in one place.

`assert_rounded`, of one kernel, element by element. A sum of n products of random signs, added one after the
other, meets partial sums that grow like sqrt(k) of a product and rounds each; the n errors, of random signs
too, have a standard deviation of about 0.2 eps of sum |product|, whatever n is. Added as a tree, of one sign
or not, a term meets log2 n roundings of half an eps at most. `ROUNDINGS` eps of sum |term| leaves the first
an order of magnitude and the second 256 terms at their worst, and yet one weight of 27 x 48 that is off by a
thousandth is outside. Sums |term| come from the operation itself on absolute values. What is stored in a
narrow type adds half a unit in its last place.

`assert_as_rounded`, of many float32 operations after one another. The exact computation is run again with
every operation's result moved at random by half an eps, its rounding, and every value that is contracted by
sqrt(n) quarters of one: backward error analysis puts the errors of n additions, of random signs, into their
terms. What that does to the results is their rounding noise, signs that flip at a kink included; it comes
from the computation alone, and is allowed twice.

`assert_no_worse_than_torch`, of many operations in bfloat16 and float16, where each stored tensor is rounded
to three digits and nothing else counts: torch's own error is an average over all its numbers and no luck.
"""

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

EPS = torch.finfo(torch.float32).eps
"""Of the float32 that kernels compute in, whatever they store."""

EXACT = 1e-9
"""Relative error against float64 torch when computed in float64."""

ROUNDINGS = 4.0
"""Eps of the sum of absolute terms; see above."""

ATOL = {torch.bfloat16: 1e-3, torch.float16: 2e-4}
"""What is added to twice torch's own error, relative to the norm of the result: a quarter of a last place."""


def relative_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||; NaN and inf never pass."""
    got, expected = got.detach().double(), expected.detach().double()
    error = (got - expected).norm() / expected.norm().clamp_min(1e-30)
    return float(error) if bool(torch.isfinite(error)) else float("inf")


def assert_exact(got: Tensor, expected: Tensor, what: str = "") -> None:
    assert got.shape == expected.shape
    assert relative_error(got, expected) <= EXACT, what


# ---------------------------------------------------------------- one kernel
def last_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of a type at the size of `values`."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.double().abs())
    return torch.ldexp(torch.full_like(values, info.eps, dtype=torch.float64), exponent - 1).clamp_min(
        info.smallest_normal * info.eps
    )


def slack(terms: Tensor) -> Tensor:
    """The error of sums whose absolute terms add to `terms`."""
    return ROUNDINGS * EPS * terms


def stored(exact: Tensor, error: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A result in float32, of so much error, as a narrow type holds it, and by how much that is open: 0
    nearly everywhere, for rounding makes one number of both ends of the error.

    In float32 the result itself and nothing: its error is then one of the roundings of the sums it enters.
    """
    if dtype == torch.float32:
        return exact, torch.zeros_like(exact)
    low, high = ((exact + sign * error).to(dtype).double() for sign in (-1, 1))
    return (low + high) / 2, (high - low) / 2


def slack_of_sum(parts: Tensor, slacks: Tensor, dim: tuple[int, ...]) -> Tensor:
    """The error of a sum over `dim`: its own, and that of its parts, which are independent."""
    return slack(parts.abs().sum(dim)) + slacks.square().sum(dim).sqrt()


def assert_rounded(got: Tensor, exact: Tensor, allowed: Tensor, what: str = "") -> None:
    """Every element within `allowed` of the exact one and half a unit in the last place of got's type."""
    assert got.shape == exact.shape, what
    got, exact = got.detach().cpu(), exact.detach()
    allowed = allowed + last_place(exact.abs() + allowed, got.dtype) / 2
    excess = (got.double() - exact).abs() / allowed.clamp_min(1e-300)
    wrong = ~(excess <= 1)
    if bool(wrong.any()):
        worst = int(excess.nan_to_num(math.inf).argmax())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {got.numel()} elements wrong; at element {worst} got "
            f"{got.flatten()[worst].item()!r}, expected {exact.flatten()[worst].item()!r} within "
            f"{allowed.expand_as(exact).flatten()[worst].item():.1e}"
        )


# ---------------------------------------------------------------- many operations
class _Noise(TorchDispatchMode):
    """Moves what every operation makes, and what it contracts, at random; see above."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def moved(self, value: object, by: float = 0.5) -> object:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        noise = torch.randn(value.shape, generator=self.generator, dtype=value.dtype)
        return value * (1 + by * EPS * noise)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if terms := _contracted(func, args):
            args = tree_map(lambda value: self.moved(value, math.sqrt(terms) / 4), args)
        out = func(*args, **(kwargs or {}))
        if any(result.alias_info is not None for result in func._schema.returns):
            return out  # a view, or an argument
        return tree_map(self.moved, out)


def _contracted(func, args) -> int:  # type: ignore[no-untyped-def]
    """How many products an element of an operation's result adds up."""
    name = func.overloadpacket.__name__
    sizes = [value.shape for value in tree_leaves(args) if isinstance(value, Tensor)]
    if name == "convolution":
        return math.prod(sizes[1][1:])
    if name == "convolution_backward":  # of the input; the weight's adds up voxels
        return max(math.prod(sizes[2][1:]), math.prod(sizes[0][2:]) * sizes[0][0])
    return sizes[-1][-2] if name in ("mm", "bmm", "addmm") else 0


Results = dict[str, Tensor]
Computed = TypeVar("Computed")


def moved_by_rounding(compute: Callable[[], Computed], seed: int) -> Computed:
    """The results of a float64 computation as they might be in float32."""
    with _Noise(seed):
        return compute()


def rounding_noise(compute: Callable[[], Results], exact: Results, runs: int = 3) -> dict[str, float]:
    """By how much the results of a float64 computation move, relative to their norms, if it is rounded."""
    noise = dict.fromkeys(exact, 0.0)
    for seed in range(runs):
        moved = moved_by_rounding(compute, seed)
        for name, value in exact.items():
            noise[name] = max(noise[name], relative_error(moved[name], value))
    return noise


def assert_as_rounded(ours: Results, exact: Results, noise: dict[str, float]) -> None:
    """No result is further from the exact one than twice its rounding noise."""
    for name, expected in exact.items():
        error = relative_error(ours[name], expected)
        assert error <= 2 * noise[name] + EPS, f"{name}: {error:.2e} from exact, rounding {noise[name]:.2e}"


def assert_no_worse_than_torch(
    ours: Tensor, torchs: Tensor, exact: Tensor, dtype: torch.dtype, what: str = ""
) -> None:
    """Our error is at most twice torch's own where tensors are stored in `dtype`, plus a small constant."""
    assert ours.dtype == torchs.dtype, what
    own, theirs = relative_error(ours, exact), relative_error(torchs, exact)
    assert own <= 2 * theirs + ATOL[dtype], f"{what}: ours {own:.2e}, torch's {theirs:.2e}"


def joined(results: Results | Iterable[Tensor]) -> Tensor:
    """All results as one vector, of float64."""
    values = results.values() if isinstance(results, dict) else results
    return torch.cat([value.detach().double().flatten() for value in values if value is not None])
