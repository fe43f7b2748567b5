"""The last layer and the head in one: convolution, normalisation, activation, 1x1x1 head, loss sums.

Nothing of the layer is stored, so its output is made again in every sweep:

    F3  mean and variance of the convolution (or of its sum with another expression)
    F4  the sums of the loss
    B1  S0 = sum dz and S1 = sum dz (y - mean), the gradients of beta and scale
    B2  with them, the gradient of y voxel by voxel, and from it everything else

with dz the gradient at the normalised output. F3 and F4 are forward, B1 and B2 backward. Where there are
few classes F4 collects what B1 would (`effseg.operators.norm_sums`), and B1 is not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from effseg.algorithms.interface import Algorithm, Head, Sums
from effseg.algorithms.pullback import Pullback, added, rows
from effseg.common.device import make_room
from effseg.common.formats import CHANNELS_LAST, accumulation_dtype
from effseg.expressions.base import Deferred, Normalisation, Spec, Stored, readable
from effseg.expressions.slabs import Slab, Window, slabs
from effseg.operators.checks import unknown_labels
from effseg.operators.conv3d import thickness, through_statistics
from effseg.operators.head import COUNTS, each_its_part, head_gradients, over_processes
from effseg.operators.moments import Moments
from effseg.operators.norm_backward import NormBackward
from effseg.operators.norm_sums import NormSums, terms_from_sums
from effseg.operators.normalisation import Merging, Running, layer_terms
from effseg.operators.operator import Operator

# How many tensors of a slab the sweeps F4 and B2 hold at a time, about.
FORWARD_SLABS, BACKWARD_SLABS = 4, 7


class Tail(NamedTuple):
    """leaky_relu(norm(conv(x, weight) + offset + addend), slope), whose convolution is not stored.

    how, running: the norm's settings, see `effseg.operators.normalisation.merging`; gamma, beta: its
    parameters; offset: the convolution's bias (Co,); addend: of the convolution's shape and type; statistics:
    mean and variance (N, Co) of conv(x, weight) + addend, where they are known.
    """

    x: Deferred
    weight: Tensor
    window: Window
    slope: float
    how: Merging
    running: Running
    gamma: Tensor | None
    beta: Tensor | None
    offset: Tensor | None = None
    addend: Deferred | None = None
    statistics: tuple[Tensor, Tensor] | None = None


class Static(NamedTuple):
    """own: how many tensors x has, which those of the addend follow; checks: see
    `effseg.operators.head.Static`."""

    spec: Spec
    window: Window
    slope: float
    slab_elements: int | None
    how: Merging
    addend: Spec | None
    own: int
    ignore_index: int | None
    checks: bool


class LayerStatic(NamedTuple):
    spec: Spec
    window: Window
    slab_elements: int | None
    addend: Spec | None
    own: int


class Parameters(NamedTuple):
    """What the operator takes besides the expressions' tensors."""

    labels: Tensor
    class_weights: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    weight: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    offset: Tensor | None
    head_weight: Tensor
    head_bias: Tensor | None

    @property
    def running(self) -> Running:
        return _both(self.running_mean, self.running_var)

    @property
    def statistics(self) -> tuple[Tensor, Tensor] | None:
        return _both(self.mean, self.var)


COUNT = len(Parameters._fields)


def _both(mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if mean is None or var is None else (mean, var)


def tail_sums(
    tail: Tail,
    head_weight: Tensor,
    head_bias: Tensor | None,
    labels: Tensor,
    class_weights: Tensor | None = None,
    ignore_index: int | None = None,
    slab_elements: int | None = None,
) -> tuple[Sums, Tensor, Tensor]:
    """`Sums` of softmax(head(tail)) against labels (N, D, H, W), and mean and biased variance (N, C) of the
    convolution (and what is added to it), for running statistics.

    Kept for backward besides the arguments: mean and variance, and what stands in for sweep B1. Neither the
    convolution's output nor its gradient exists but for a slab.
    """
    x, addend = tail.x, tail.addend
    running_mean, running_var = tail.running or (None, None)
    mean, var = tail.statistics or (None, None)
    given = Parameters(
        labels, class_weights, running_mean, running_var, mean, var, tail.weight, tail.gamma, tail.beta,
        tail.offset, head_weight, head_bias,
    )  # fmt: skip
    static = Static(
        x.spec, tail.window, tail.slope, slab_elements, tail.how, addend and addend.spec, len(x.tensors),
        ignore_index, torch.compiler.is_compiling(),
    )  # fmt: skip
    tensors = (*given, *x.tensors, *(addend.tensors if addend else ()))
    *sums, mean, var = _tail_sums(labels.device, x.dtype, static, tensors)
    return Sums(*sums), mean, var


@torch.no_grad()
def layer_statistics(
    x: Deferred,
    weight: Tensor,
    window: Window,
    slab_elements: int | None = None,
    addend: Deferred | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (N, C) of conv(x, weight) + addend, not stored; without a gradient."""
    static = LayerStatic(x.spec, window, slab_elements, addend and addend.spec, len(x.tensors))
    tensors = (weight, *x.tensors, *(addend.tensors if addend else ()))
    mean, var = _layer_statistics(x.device, x.dtype, static, tensors)
    return mean, var


def _layer(
    ops: Algorithm, static: Static | LayerStatic, weight: Tensor, tensors: Sequence[Tensor], slope: float
) -> Layer:
    own, others = tensors[: static.own], tuple(tensors[static.own :])
    addend = None if static.addend is None else Deferred(static.addend, others)
    return Layer(ops, static.spec, own, weight, static.window, slope, static.slab_elements, addend)


def _made(ops: Algorithm, static: Static, tensors: Sequence[Tensor]) -> tuple[Parameters, Layer, Head]:
    given = Parameters(*tensors[:COUNT])
    layer = _layer(ops, static, given.weight, tensors[COUNT:], static.slope)
    head = ops.make_head(
        layer, given.head_weight, given.head_bias, given.labels.device, given.class_weights,
        static.ignore_index,
    )  # fmt: skip
    return given, layer, head


def _forward(
    ops: Algorithm, static: Static, tensors: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    given, layer, head = _made(ops, static, tensors)
    layer.make_room(head)
    known = given.statistics
    mean, var = sweep_statistics(layer) if known is None else (t.clone() for t in known)
    norm = layer_terms(static.how, given.running, mean, var, given.gamma, given.beta, given.offset)
    sums, collected = tail_sums_forward(layer, norm, head, given.labels)
    if static.checks:
        unknown_labels(sums.unknown, head.classes)
    return (*sums, mean, var), () if collected is None else (collected,)


def _own(outputs: Sequence[Tensor], besides: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    *_, mean, var = outputs
    return mean, var, besides[0] if besides else None


def _backward(
    ops: Algorithm,
    static: Static,
    own: tuple[Tensor, Tensor, Tensor | None],
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    mean, var, collected = own
    given, layer, head = _made(ops, static, tensors)
    norm = NormBackward(static.how, given.running, mean, var, given.gamma, given.beta, given.offset)
    *sums, _, _ = grads
    grad_weight, found = tail_sums_backward(
        layer, needed[COUNT:], mean, norm.terms, norm, head, given.labels, Sums(*sums), collected
    )
    head_grads = head_gradients(head, given.head_weight, given.head_bias)
    own_grads = (grad_weight, norm.grad_gamma, norm.grad_beta, norm.grad_offset)
    return [*[None] * 6, *own_grads, *head_grads, *found]


def _fake(ops: Algorithm, static: Static, tensors: Sequence[Tensor]) -> list[Tensor]:
    given, layer, head = _made(ops, static, tensors)
    n, c, *_ = layer.shape
    sums = Sums.zeros(n, head.classes, given.labels.device)
    moments = [given.weight.new_empty(n, c, dtype=accumulation_dtype(layer.dtype)) for _ in range(2)]
    return [*sums, *moments, *([NormSums(n, head).total] if collects(layer, head) else [])]


def _statistics_forward(
    ops: Algorithm, static: LayerStatic, tensors: Sequence[Tensor]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    weight, *inner = tensors
    return sweep_statistics(_layer(ops, static, weight, inner, 1.0)), ()


def _fake_statistics(ops: Algorithm, static: LayerStatic, tensors: Sequence[Tensor]) -> list[Tensor]:
    shape, dtype = (static.spec.shape[0], tensors[0].shape[0]), accumulation_dtype(static.spec.dtype)
    return [tensors[0].new_empty(shape, dtype=dtype) for _ in range(2)]


_SUMS = len(Sums._fields)
_tail_sums = Operator(
    "tail_sums", Static, _forward, _backward, _fake, outputs=_SUMS + 2, constants=(*COUNTS, _SUMS, _SUMS + 1),
    own=_own, zeros=True,
)  # fmt: skip
_layer_statistics = Operator(
    "layer_statistics", LayerStatic, _statistics_forward, None, _fake_statistics, outputs=2
)


@dataclass(frozen=True)
class Layer:
    """leaky_relu(norm(conv(expression, weight) + addend), slope), its convolution in the expression's type.

    addend: an expression of the convolution's shape and type, or None.
    """

    ops: Algorithm
    spec: Spec
    tensors: Sequence[Tensor]
    weight: Tensor
    window: Window
    slope: float
    slab_elements: int | None
    addend: Deferred | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        d, h, w = self.spec.shape[2:]
        return (self.spec.shape[0], self.weight.shape[0], *self.window.output_size((d, h, w)))

    @cached_property
    def low(self) -> Tensor:
        return self.weight.detach().to(self.dtype, memory_format=CHANNELS_LAST)

    @cached_property
    def stored(self) -> list[Stored]:
        return readable(self.spec, self.tensors, self.window)

    @cached_property
    def stored_addend(self) -> list[Stored]:
        assert self.addend is not None
        return readable(self.addend.spec, self.addend.tensors, None)

    def slabs(self) -> Iterator[Slab]:
        return slabs(self.shape[0], self.shape[2], self._thickness())

    def make_room(self, head: Head) -> None:
        """For the slabs of all sweeps, and for the gradient of the largest tensor on a coarser grid: the
        forward sweeps can use that, too."""
        tensors = (t for t in self.tensors if t.dim() == 5 and t.shape[2:] != self.spec.shape[2:])
        gradient = max((t.untyped_storage().nbytes() for t in tensors), default=0)
        _, c, _, h, w = self.shape
        voxels = self._thickness() * h * w
        slab = c * voxels * self.dtype.itemsize
        forward = FORWARD_SLABS * slab
        if collects(self, head):
            forward += NormSums.nbytes(self.weight, head.classes, voxels)
        make_room(self.weight.device, gradient, max(BACKWARD_SLABS * slab, forward - gradient))

    def _thickness(self) -> int:
        return thickness(self.spec, self.shape, self.window, self.slab_elements, self.weight.device)

    def input_rows(self, lo: int, hi: int) -> tuple[int, int, tuple[int, int]]:
        """Rows of the expression that rows [lo, hi) read, and the rows of zeros before and after them."""
        return self.window.input_rows(lo, hi, self.spec.shape[2])

    def raw(self, sample: int, lo: int, hi: int) -> Tensor:
        """Rows of what is normalised."""
        first, last, pad = self.input_rows(lo, hi)
        a = rows(self.ops, self.spec, self.stored, sample, first, last)
        y = self.ops.convolution(a, self.low, None, self.window, pad)
        if self.addend is None:
            return y
        return y.add_(rows(self.ops, self.addend.spec, self.stored_addend, sample, lo, hi))

    def activated(self, y: Tensor, sample: int, norm: Normalisation) -> Tensor:
        mean, scale, beta = (t[sample : sample + 1] for t in norm)
        with torch.no_grad():
            return self.ops.norm_act(y, mean, scale, beta, self.slope)


def sweep_statistics(layer: Layer) -> tuple[Tensor, Tensor]:
    """Sweep F3: mean and biased variance (N, C)."""
    shape = layer.shape
    moments = Moments(layer.ops, (shape[0], shape[1]), layer.dtype, layer.weight.device)
    for sample, lo, hi, _ in layer.slabs():
        moments.add(sample, layer.raw(sample, lo, hi))
    return moments.merge(shape)


def collects(layer: Layer, head: Head) -> bool:
    """Whether sweep F4 collects what B1 would."""
    return head.shows_probabilities and NormSums.pays(layer.weight, head.classes)


def tail_sums_forward(
    layer: Layer, norm: Normalisation, head: Head, labels: Tensor
) -> tuple[Sums, Tensor | None]:
    """Sweep F4: the sums, and what stands in for sweep B1 where that is cheaper, (N, 3, K, 4, C), of this
    process's rows."""
    sums = Sums.zeros(layer.shape[0], head.classes, labels.device)
    collected = NormSums(layer.shape[0], head) if collects(layer, head) else None
    for sample, lo, hi, here in layer.slabs():
        y = layer.raw(sample, lo, hi)
        z = layer.activated(y, sample, norm)
        also = None if collected is None else collected.slab(sample, y, z, norm.mean[sample], layer.slope)
        head.add_sums(sums, sample, z, labels[sample, here], also)
    return over_processes(sums), None if collected is None else collected.total


def tail_sums_backward(
    layer: Layer,
    needed: Sequence[bool],
    mean: Tensor,
    norm: Normalisation,
    norm_backward: Callable[[Normalisation], tuple[Tensor | None, Tensor | None]],
    head: Head,
    labels: Tensor,
    grads: Sums,
    collected: Tensor | None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of the layer's weight and of the tensors of its expression and its addend; the head's add up
    in `head`.

    needed: of those tensors; mean: of what is normalised, (N, C); norm_backward takes the gradients of
    (mean, scale, beta) and gives those of that mean and its variance (it also takes care of the norm's weight
    and bias);
    collected: as given by the forward sweep.
    """
    grads = each_its_part(grads)
    if collected is None:
        scale, beta = _sweep_terms(layer, norm, head, labels, grads)
    else:
        scale, beta = terms_from_sums(collected, head, grads)
    scale, beta = scale.to(mean.dtype), beta.to(mean.dtype)
    folded = through_statistics(
        layer.shape, mean, *norm_backward(Normalisation(-norm.scale * beta, scale, beta))
    )
    ops, spec, window = layer.ops, layer.spec, layer.window
    low = layer.low
    grad_weight = None
    pullback = Pullback(ops, spec, layer.tensors, needed[: len(layer.tensors)], window=window)
    added_on = None
    if layer.addend is not None:
        added_on = Pullback(ops, *layer.addend, needed[len(layer.tensors) :])
    for sample, lo, hi, here in layer.slabs():
        first, last, pad = layer.input_rows(lo, hi)
        a = pullback.rows(sample, first, last)
        with torch.no_grad():
            y = ops.convolution(a, low, None, window, pad)
        if added_on is not None:
            y.add_(added_on.rows(sample, lo, hi))
        z = layer.activated(y, sample, norm)
        grad = head.pull(grads, sample, z, labels[sample, here])
        one = slice(sample, sample + 1)
        grad_y = ops.norm_act_backward(
            grad, y, z, norm.mean[one], norm.scale[one], layer.slope, need_dy=True
        ).dy
        del z, grad
        if folded is not None:
            grad_y = ops.fold(grad_y, y, *(t[sample] for t in folded))
        assert grad_y is not None
        del y
        if added_on is not None and added_on.any:
            added_on.pull(grad_y)
        grad_a, grad_w = ops.convolution_backward(grad_y, a, low, window, pad, pullback.any, True)
        assert grad_w is not None
        grad_weight = added(grad_weight, grad_w, mean.dtype)
        del a, grad_y, grad_w
        if grad_a is not None:
            pullback.pull(grad_a)
        del grad_a
    if grad_weight is None:  # no slab was this process's
        grad_weight = torch.zeros_like(layer.weight)
    found = pullback.gradients() + ([] if added_on is None else added_on.gradients())
    return grad_weight.to(layer.weight.dtype), found


def _sweep_terms(
    layer: Layer, norm: Normalisation, head: Head, labels: Tensor, grads: Sums
) -> tuple[Tensor, Tensor]:
    """Sweep B1: gradients of scale and beta, float64."""
    scale, beta = (torch.zeros_like(norm.mean, dtype=torch.float64) for _ in range(2))
    for sample, lo, hi, here in layer.slabs():
        one = slice(sample, sample + 1)
        y = layer.raw(sample, lo, hi)
        z = layer.activated(y, sample, norm)
        grad = head.pull(grads, sample, z, labels[sample, here], parameters=False)
        found = layer.ops.norm_act_backward(
            grad, y, z, norm.mean[one], norm.scale[one], layer.slope, need_terms=True
        )
        assert found.dscale is not None
        assert found.dbeta is not None
        scale[one].add_(found.dscale)
        beta[one].add_(found.dbeta)
    return scale, beta
