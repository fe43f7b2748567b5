"""Expressions of every kind, each with its value in plain torch."""

import torch
import torch.nn.functional as F
from tolerances import assert_as_rounded, assert_no_worse_than_torch, rounding_noise

from effseg import functional
from effseg.expressions.base import Normalisation


def leaf(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def plain_norm(y, mean, scale, beta):
    mean, scale, beta = (t[..., None, None, None].to(y.dtype) for t in (mean, scale, beta))
    return (y - mean) * scale + beta


class Case:
    """One expression of each kind, and its value in plain torch."""

    def __init__(self, kind, n=2, c=3, size=(5, 4, 7), dtype=torch.float64):
        torch.manual_seed(0)
        self.kind = kind
        half = [(s + 1) // 2 for s in size]
        self.y, self.y2 = leaf(n, c, *size, dtype=dtype), leaf(n, c, *size, dtype=dtype)
        self.coarse, self.weight, self.bias = leaf(n, 4, *half, dtype=dtype), leaf(c, 4, 1, 1, 1), leaf(c)
        self.image, self.kernel = torch.randn(n, 2, *size), leaf(c, 2, 3, 3, 3)
        self.square = leaf(c, c, 3, 3, 3)
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        self.terms = [Normalisation(*(leaf(n, c, dtype=accumulate) for _ in range(3))) for _ in range(2)]

    def deferred(self):
        f, y = functional, self.y
        raw = f.raw(y, self.terms[0], 0.01)
        if self.kind == "plain":
            return f.plain(y)
        if self.kind == "raw":
            return raw
        if self.kind == "residual":
            return f.residual(raw, self.y2, self.terms[1], 0.01)
        if self.kind == "stem":
            window = f.convolution_window(3)
            return f.convolved(f.plain(self.image, y.dtype), self.kernel, window, self.terms[0], 0.01)
        if self.kind == "conv":
            return f.convolved(raw, self.square, f.convolution_window(3), self.terms[1], 0.01)
        if self.kind == "up":
            return f.upsample_add(None, f.plain(self.coarse), self.weight, self.bias, tuple(y.shape[2:]))
        return f.upsample_add(raw, f.plain(self.coarse), self.weight)

    def eager(self):
        y = self.y
        raw = F.leaky_relu(plain_norm(y, *self.terms[0]), 0.01)
        if self.kind == "plain":
            return y
        if self.kind == "raw":
            return raw
        if self.kind == "residual":
            return F.leaky_relu(raw + plain_norm(self.y2, *self.terms[1]), 0.01)
        if self.kind == "stem":
            z = F.conv3d(self.image.to(y.dtype), self.kernel.to(y.dtype), padding=1)
            return F.leaky_relu(plain_norm(z, *self.terms[0]), 0.01)
        bias = self.bias.to(y.dtype) if self.kind == "up" else None
        if self.kind == "conv":
            z = F.conv3d(raw, self.square.to(y.dtype), padding=1)
            return F.leaky_relu(plain_norm(z, *self.terms[1]), 0.01)
        up = F.conv3d(self.coarse, self.weight.to(y.dtype), bias)
        d, h, w = y.shape[2:]
        up = F.interpolate(up, scale_factor=2, mode="trilinear", align_corners=False)[:, :, :d, :h, :w]
        return up if self.kind == "up" else raw + up

    def leaves(self):
        return {
            "plain": [self.y],
            "raw": [self.y, *self.terms[0]],
            "residual": [self.y, *self.terms[0], self.y2, *self.terms[1]],
            "stem": [self.kernel, *self.terms[0]],
            "conv": [self.y, *self.terms[0], self.square, *self.terms[1]],
            "up": [self.coarse, self.weight, self.bias],
            "up_add": [self.y, *self.terms[0], self.coarse, self.weight],
        }[self.kind]


KINDS = ("plain", "raw", "residual", "stem", "conv", "up", "up_add")


def reference_conv(a, weight, bias, kernel, stride):
    y = F.conv3d(a, weight, bias, stride, tuple(k // 2 for k in kernel))
    var, mean = torch.var_mean(y, (2, 3, 4), correction=0)
    return y, mean, var


def convolved_in(like, dtype, kind, channels, size, out_channels=32, ours=True):
    """y, mean, var of a convolution of an expression computed in `like`, by us or by torch, and the gradients
    of weights, of what is stored and of the scales of norms; all from values that `dtype` holds exactly."""
    case = Case(kind, n=1, c=channels, size=size, dtype=like)
    case.weight = case.weight.detach().to(like).requires_grad_()
    if like == torch.float64:
        for name in ("y", "y2", "coarse", "weight"):
            rounded = getattr(case, name).detach().to(dtype).double()
            setattr(case, name, rounded.requires_grad_())
        case.terms = [
            Normalisation(*(t.detach().float().double().requires_grad_() for t in terms))
            for terms in case.terms
        ]
    weight = 0.1 * torch.randn(out_channels, channels, 3, 3, 3, dtype=torch.float64)
    weight = weight.to(dtype).to(like).requires_grad_()
    if ours:
        y, mean, var = functional.conv3d(case.deferred(), weight, dtype=like)
    else:
        y = F.conv3d(case.eager(), weight, padding=1)
        wide = y if like == torch.float64 else y.float()
        var, mean = torch.var_mean(wide, (2, 3, 4), correction=0)
    torch.manual_seed(1)
    grads = [torch.randn(t.shape, dtype=torch.float64).to(t.dtype) for t in (y, mean, var)]
    names = {"y": y, "mean": mean, "var": var}
    scales = [terms.scale for terms in case.terms]
    chosen = [t for t in case.leaves() if t.dim() > 2 or any(t is scale for scale in scales)]
    leaves = {f"grad {i}": t for i, t in enumerate([weight, *chosen])}
    found = torch.autograd.grad([y, mean, var], list(leaves.values()), grads)
    return {k: t.detach() for k, t in (names | dict(zip(leaves, found, strict=True))).items()}


def assert_convolved(dtype, *of, **options):
    """Our convolution of an expression is as close to the exact one as its type allows."""

    def exactly():
        return convolved_in(torch.float64, dtype, *of, ours=False, **options)

    ours, exact = convolved_in(dtype, dtype, *of, **options), exactly()
    if dtype == torch.float32:
        assert_as_rounded(ours, exact, rounding_noise(exactly, exact))
        return
    torchs = convolved_in(dtype, dtype, *of, ours=False, **options)
    for name, expected in exact.items():
        assert_no_worse_than_torch(ours[name], torchs[name], expected, dtype, f"{of} {name}")
