"""Only what computes the right thing is timed: a contender against another way to compute the same network.

Ours against the same architecture in stock torch, a converted network and any other implementation against
its own eager form, from the same weights and data, over one step of a small volume. Eager baselines must be
finite.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effseg.benchmarking.registry import Case, Contender, Workload, contenders
from effseg.benchmarking.trainee import Trainee
from effseg.common.formats import DTYPES

# Six levels below 64 voxels an axis has two, where much of a bf16 gradient is rounding.
VOLUMES = {"fp32": (64, 64, 64), "bf16": (96, 96, 96)}
TOLERANCE = {"fp32": 2e-3, "bf16": 3e-2}
"""Relative error of the loss, and of all gradients taken as one vector, against the reference in float32;
twice the error of the reference with operands and results rounded to that type where that is more."""
TF32_TOLERANCE = 1e-2
"""In place of fp32's where convolutions round their operands to TF32, as torch's do on a GPU by default."""
FLIPPED = {"fp32": 0.01, "bf16": 0.05}
"""Share of voxels whose classes may differ: those of an untrained network are close calls."""

Weights = dict[str, Tensor]


class Outcome(NamedTuple):
    """Of one inference and one step: loss, gradients (all of them, float32, by parameter name), classes."""

    loss: float
    gradient: Tensor
    classes: Tensor


@lru_cache(maxsize=256)
def verdict(contender: Contender, dtype: str, device: torch.device, classes: int = 15) -> str:
    """What is wrong with a contender that is not `missing`, with the numbers, or nothing."""
    case = Case(contender, Workload(VOLUMES[dtype], classes))
    twin = reference(contender)
    if twin is None:
        return not_finite(outcome(case, dtype, device))
    return compared(case, twin, dtype, device)[0]


def compared(case: Case, twin: Contender, dtype: str, device: torch.device) -> tuple[str, str]:
    """What is wrong with a contender beside its twin in float32, or nothing; and the errors."""
    weights, exact, own_error = _expected(Case(twin, case.workload), dtype, device)
    got = outcome(case, dtype, device, weights)
    tf32 = dtype == "fp32" and device.type == "cuda" and torch.backends.cudnn.allow_tf32
    tolerance = max(TF32_TOLERANCE if tf32 else TOLERANCE[dtype], 2 * own_error)
    loss, gradient = errors(got, exact)
    told = (
        f"relative error {loss:.1e} of the loss, {gradient:.1e} of the gradients, "
        f"{own_error:.1e} of its twin rounded"
    )
    return not_finite(got) or disagreement(got, exact, tolerance, FLIPPED[dtype]), told


def reference(contender: Contender) -> Contender | None:
    """The contender that must give the same; None for one that is nobody else's form."""
    known = contenders()
    twin = known.get(f"stock-{contender.network}/eager") or known.get(f"{contender.network}/eager")
    return None if twin == contender else twin


def disagreement(got: Outcome, exact: Outcome, tolerance: float, flipped: float) -> str:
    """What differs by more, or nothing."""
    loss, gradient = errors(got, exact)
    if not (loss <= tolerance and gradient <= tolerance):
        return (
            f"relative error {loss:.1e} of the loss, {gradient:.1e} of the gradients; at most {tolerance:.1e}"
        )
    share = float((got.classes != exact.classes).float().mean())
    return "" if share <= flipped else f"{share:.1%} of voxels' classes differ; at most {flipped:.0%}"


def errors(got: Outcome, exact: Outcome) -> tuple[float, float]:
    """Relative, of the loss and of the gradients."""
    loss = abs(got.loss - exact.loss) / abs(exact.loss)
    return loss, float((got.gradient - exact.gradient).norm() / exact.gradient.norm())


def not_finite(found: Outcome) -> str:
    """What is infinite or no number, or nothing."""
    norm = float(found.gradient.norm())
    if torch.tensor([found.loss, norm]).isfinite().all():
        return ""
    return f"loss {found.loss:.3g}, norm of the gradients {norm:.3g}"


@lru_cache(maxsize=1)
def _expected(case: Case, dtype: str, device: torch.device) -> tuple[Weights, Outcome, float]:
    """Weights, what the reference gives with them in float32, and its error when rounded to the type: kept
    for the next contender of that network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = case.contender.make(case.workload.classes).state_dict()
    exact = outcome(case, "fp32", device, weights)
    if dtype == "fp32":
        return weights, exact, 0.0
    return weights, exact, max(errors(_rounded(case, DTYPES[dtype], device, weights), exact))


def outcome(case: Case, dtype: str, device: torch.device, weights: Weights | None = None) -> Outcome:
    """weights: None for random ones."""
    trainee = Trainee(case, dtype, device)
    if weights is not None:
        trainee.model.load_state_dict(weights)
    classes = trainee.infer().cpu()
    loss = trainee.gradients()
    return Outcome(loss.item(), _gradient(trainee.model), classes)


def _rounded(case: Case, dtype: torch.dtype, device: torch.device, weights: Weights) -> Outcome:
    """In float32, with what modules keep and hand on rounded to the type. The library's own kernels of that
    type are no measure: oneDNN's are wrong at some shapes of deep levels, now and then beyond all bounds."""
    trainee = Trainee(case, "fp32", device)
    trainee.model.load_state_dict({name: _as(value, dtype) for name, value in weights.items()})
    trainee.image = _as(trainee.image, dtype)
    for module in trainee.model.modules():
        if not any(module.children()):
            module.register_forward_hook(lambda module, args, result: _Rounded.apply(result, dtype))
    loss = trainee.gradients()
    gradient = _as(_gradient(trainee.model), dtype)
    return Outcome(loss.item(), gradient, trainee.infer().cpu())


class _Rounded(torch.autograd.Function):
    """A tensor and its gradient, rounded to a type and held in their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return _as(x, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _as(grad, ctx.dtype), None


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(x.dtype) if x.is_floating_point() else x


def _gradient(model: nn.Module) -> Tensor:
    found = sorted((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    return torch.cat([grad.flatten().float().cpu() for _, grad in found])
