"""What torch's functions do to lazy tensors.

Each rule has its function's own arguments and returns NotImplemented where it does not take them; then the
function gets ordinary tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effseg import nodes
from effseg.composed import Shared, concatenation, pooling, transposed_conv
from effseg.conversion import watch
from effseg.conversion.lazy import Convolution, LazyTensor, Value, real
from effseg.conversion.outputs import convolve
from effseg.deferred import Deferred, Normalisation, Raw, Residual, UpAdd, plain, raw, residual, upsample_add
from effseg.functional import compute_dtype
from effseg.normalisation import Merging, terms, update_running
from effseg.slabs import Window

Triple = tuple[int, int, int]
IDENTITY = 1.0  # the slope of no activation


def rule(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        LazyTensor.handlers.update(dict.fromkeys(functions, handler))
        return handler

    return register


# Convolutions


@rule(torch.conv3d, F.conv3d)
def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if not isinstance(input, LazyTensor) or groups != 1 or set(triple(dilation)) != {1}:
        return NotImplemented
    kernel = triple(weight.shape[2:])
    same = tuple(k // 2 for k in kernel)
    if not all(k % 2 for k in kernel) or (padding != "same" and _pads(padding) != same):
        return NotImplemented
    watch.took("convolution")
    x = input.deferred(compute_dtype(weight.device, weight))
    return LazyTensor(Convolution(x, weight, bias, Window(kernel, triple(stride))))


def _pads(padding: Any) -> Triple:
    return (0, 0, 0) if padding == "valid" else triple(padding)


@rule(torch.conv_transpose3d, F.conv_transpose3d)
def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    """Taken where the kernel is the stride, so that no two voxels meet."""
    plain_ones = {*triple(padding), *triple(output_padding)} == {0} and set(triple(dilation)) == {1}
    if not isinstance(input, LazyTensor) or groups != 1 or not plain_ones:
        return NotImplemented
    if triple(stride) != triple(weight.shape[2:]):
        return NotImplemented
    found = transposed_conv(input.deferred(compute_dtype(weight.device, weight)), weight, bias)
    watch.took("transposed convolution", math.prod(found.shape))
    return LazyTensor(found)


# Normalisations


@rule(torch.instance_norm, F.instance_norm)
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    running = _running(running_mean, running_var)
    return _normalised(input, Merging(eps), running, not use_input_stats, momentum, weight, bias)


@rule(torch.batch_norm, F.batch_norm)
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    how = Merging(eps, samples=True)
    running = _running(running_mean, running_var)
    return _normalised(input, how, running, not training, momentum, weight, bias)


@rule(torch.group_norm, F.group_norm)
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    if not isinstance(input, LazyTensor) or input.shape[1] % num_groups:
        return NotImplemented
    return _normalised(input, Merging(eps, groups=num_groups), None, False, 0.0, weight, bias)


def _running(mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if mean is None or var is None else (mean, var)


def _normalised(
    input: Tensor,
    how: Merging,
    running: tuple[Tensor, Tensor] | None,
    uses_running: bool,
    momentum: float,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Any:
    """The raw output of a convolution, stored, or any other tensor, stored; normalised where it is used.

    A convolution's bias moves y by as much as the mean, and is left to the three numbers per channel.
    """
    if not isinstance(input, LazyTensor) or (uses_running and running is None):
        return NotImplemented
    value, offset = input.value, None
    if isinstance(value, Convolution):
        y, mean, var = convolve(value.x, value.weight, None, value.window, statistics=True)
        assert mean is not None
        assert var is not None
        offset = value.bias
        input.become(y if offset is None else _shifted(y, offset, mean))  # should something else read it
        watch.took("normalisation after convolution", y.numel())
    else:
        y = input.materialise()
        mean, var = nodes.statistics(y)
        watch.took("normalisation", y.numel())
    moved = mean if offset is None else mean + offset.to(mean.dtype)
    if running is not None and not uses_running:
        update_running(running, moved, var, y[0, 0].numel(), momentum, how.samples)
    norm = terms(how, running if uses_running else None, moved, var, weight, bias)
    if offset is not None:
        norm = norm._replace(mean=norm.mean - offset.to(mean.dtype))
    if y.dtype != torch.float64:
        norm = Normalisation(*(t.float() for t in norm))
    return LazyTensor(raw(y, norm, IDENTITY))


def _shifted(y: Tensor, bias: Tensor, like: Tensor) -> Deferred:
    """y + bias, not stored."""
    zero = torch.zeros_like(like)
    return raw(y, Normalisation(zero - bias.to(like.dtype), zero + 1, zero), IDENTITY)


# Activations


@rule(F.leaky_relu)
def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    return _activated(input, negative_slope, inplace)


@rule(F.relu)
def relu(input: Tensor, inplace: bool = False) -> Any:
    return _activated(input, 0.0, inplace)


@rule(torch.relu, Tensor.relu)
def relu_out_of_place(input: Tensor) -> Any:
    return _activated(input, 0.0, False)


@rule(torch.relu_, Tensor.relu_)
def relu_in_place(input: Tensor) -> Any:
    return _activated(input, 0.0, True)


def _activated(input: Tensor, slope: float, inplace: bool) -> Any:
    """Of a normalised tensor, or of the sum of one and another."""
    value = input.value if isinstance(input, LazyTensor) else None
    spec = value.spec if isinstance(value, Deferred) else None
    if not isinstance(spec, (Raw, Residual)) or spec.slope != IDENTITY or not slope >= 0:
        return NotImplemented
    assert isinstance(value, Deferred)
    if isinstance(spec, Raw):
        changed: Raw | Residual = Raw(spec.shape, spec.dtype, slope)
    else:
        changed = Residual(spec.shape, spec.dtype, slope, spec.inner)
    watch.took("activation", 0 if inplace else math.prod(value.shape))
    found = Deferred(changed, value.tensors)
    if isinstance(changed, Residual) and torch.is_grad_enabled():
        found = nodes.share(found)
    return _result(input, found, inplace)


def _result(input: Tensor, value: Value, inplace: bool) -> LazyTensor:
    assert isinstance(input, LazyTensor)
    return input.become(value) if inplace else LazyTensor(value)


# Sums and concatenations


@rule(torch.add, Tensor.add, Tensor.__add__)
def add(input: Any, other: Any, *, alpha: Any = 1, out: None = None) -> Any:
    return NotImplemented if out is not None else _sum(input, other, alpha, inplace=False)


@rule(Tensor.__radd__)
def radd(input: Any, other: Any) -> Any:
    return _sum(other, input, 1, inplace=False)


@rule(Tensor.add_, Tensor.__iadd__)
def add_(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    return _sum(input, other, alpha, inplace=True)


def _sum(first: Any, second: Any, alpha: Any, inplace: bool) -> Any:
    both = isinstance(first, LazyTensor) and isinstance(second, LazyTensor)
    if not both or alpha != 1 or first.shape != second.shape or first.dtype != second.dtype:
        return NotImplemented
    for one, other in ((first, second), (second, first)):
        found = _added(one.value, other)
        if found is not None:
            return _result(first, found, inplace)
    return NotImplemented


def _added(value: Value, other: LazyTensor) -> Value | None:
    """value + other, where `value` can carry a sum."""
    if isinstance(value, Convolution):
        y, _, _ = convolve(value.x, value.weight, value.bias, value.window, statistics=False)
        watch.took("sum")
        # A stored sum: nothing keeps y, so that it may become the sum.
        return y.add_(other.materialise())
    if not isinstance(value, Deferred):
        return None
    if isinstance(value.spec, Raw) and value.spec.slope == IDENTITY:
        y, *norm = value.tensors
        watch.took("sum")
        return residual(flat(other, value.dtype), y, Normalisation(*norm), IDENTITY)
    if isinstance(value.spec, UpAdd) and value.spec.skip is None:
        end = len(value.tensors) - 1 - value.spec.has_bias
        coarse = Deferred(value.spec.coarse, value.tensors[:end])
        weight, bias = value.tensors[end], value.tensors[end + 1] if value.spec.has_bias else None
        watch.took("sum", math.prod(value.shape))
        return upsample_add(other.deferred(value.dtype), coarse, weight, bias, factors=value.spec.factors)
    return None


MOST_NESTED = 3


def flat(x: LazyTensor, dtype: torch.dtype) -> Deferred:
    """A deferred expression, stored where it is a sum of sums: every use makes all of them."""
    found, depth = x.deferred(dtype), 0
    spec = found.spec
    while isinstance(spec, (Residual, Shared)):
        spec, depth = spec.inner, depth + isinstance(spec, Residual)
    return plain(x.materialise(), dtype) if depth >= MOST_NESTED else found


@rule(torch.cat, torch.concat, torch.concatenate)
def cat(tensors: Sequence[Any], dim: int = 0, *, out: None = None) -> Any:
    shapes = {(t.shape[0], *t.shape[2:]) for t in tensors if t.dim() == 5}
    if dim not in (1, -4) or out is not None or len(shapes) != 1:
        return NotImplemented
    dtypes = {t.dtype for t in tensors}
    if not all(isinstance(t, LazyTensor) for t in tensors) or len(dtypes) != 1:
        return NotImplemented
    found = concatenation([t.deferred(t.dtype) for t in tensors])
    watch.took("concatenation", math.prod(found.shape))
    return LazyTensor(found)


# Resampling


@rule(torch.max_pool3d, F.max_pool3d)
def max_pool3d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    if return_indices or set(triple(dilation)) != {1}:
        return NotImplemented
    return _pooled(input, "max", kernel_size, stride, padding, ceil_mode)


@rule(F.avg_pool3d)
def avg_pool3d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    if ceil_mode or divisor_override is not None:
        return NotImplemented
    return _pooled(input, "average", kernel_size, stride, padding, False)


def _pooled(input: Any, kind: str, kernel: Any, stride: Any, padding: Any, ceil: bool) -> Any:
    """Taken where windows neither overlap nor reach over the border."""
    window = triple(kernel)
    if stride not in (None, [], ()) and triple(stride) != window:
        return NotImplemented
    if not isinstance(input, LazyTensor) or set(triple(padding)) != {0}:
        return NotImplemented
    found = pooling(input.deferred(input.dtype), kind, window, ceil)
    watch.took("pooling", math.prod(found.shape))
    return LazyTensor(found)


@rule(F.interpolate)
def interpolate(
    input: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Any:
    """Trilinear x2 of a 1x1x1 convolution, which commutes with it."""
    value = input.value if isinstance(input, LazyTensor) else None
    doubles = size is None and scale_factor is not None and set(triple(scale_factor)) == {2}
    if not isinstance(value, Convolution) or not value.is_head or not doubles:
        return NotImplemented
    if mode != "trilinear" or align_corners or recompute_scale_factor or antialias:
        return NotImplemented
    d, h, w = (2 * n for n in value.x.shape[2:])
    watch.took("upsampling", value.weight.shape[0] * value.x.shape[0] * d * h * w)
    return LazyTensor(upsample_add(None, value.x, value.weight, value.bias, (d, h, w)))


# What changes nothing


@rule(F.dropout, F.dropout3d)
def dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return NotImplemented if training and p else input


@rule(F.pad)
def pad(input: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    return NotImplemented if any(pad) else input


@rule(Tensor.contiguous)
def contiguous(input: Any, memory_format: Any = torch.contiguous_format) -> Any:
    """Memory is channels last, whatever is asked for."""
    return input


@rule(Tensor.to)
def to(input: Any, *args: Any, **kwargs: Any) -> Any:
    """Of the type and on the device that it has."""
    wanted = [*args, *(kwargs.get(name) for name in ("dtype", "device"))]
    others = set(kwargs) - {"dtype", "device", "non_blocking", "memory_format"}
    known = (input.dtype, input.device, str(input.device), input.device.type, None, False)
    return NotImplemented if others or any(all(w != k for k in known) for w in wanted) else input


@rule(Tensor.float)
def float_(input: Any, memory_format: Any = None) -> Any:
    return input if input.dtype == torch.float32 else NotImplemented


@rule(Tensor.__getitem__)
def getitem(input: Any, index: Any) -> Any:
    """Crops that leave everything."""
    parts = index if isinstance(index, tuple) else (index,)
    if not isinstance(input, LazyTensor) or not all(p is Ellipsis or isinstance(p, slice) for p in parts):
        return NotImplemented
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts = (*parts[:at], *[slice(None)] * (input.dim() - len(parts) + 1), *parts[at + 1 :])
    whole = all(p.indices(n) == (0, n, 1) for p, n in zip(parts, input.shape, strict=False))
    return input if whole else NotImplemented


@rule(Tensor.requires_grad.__get__)  # type: ignore[attr-defined]
def requires_grad(input: LazyTensor) -> bool:
    return any(t.requires_grad for t in input.operands())


@rule(Tensor.is_leaf.__get__)  # type: ignore[attr-defined]
def is_leaf(input: LazyTensor) -> bool:
    return bool(real(input).is_leaf) if isinstance(input.value, Tensor) else not requires_grad(input)


def triple(value: Any) -> Triple:
    if isinstance(value, Sequence):
        d, h, w = value if len(value) == 3 else (value[0],) * 3
        return int(d), int(h), int(w)
    return (int(value),) * 3
