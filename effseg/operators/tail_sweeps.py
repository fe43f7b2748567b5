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

import torch
from torch import Tensor

from effseg.algorithms.interface import Algorithm, Head, Sums
from effseg.algorithms.pullback import Pullback, added, rows
from effseg.common.device import make_room
from effseg.common.formats import CHANNELS_LAST
from effseg.expressions.base import Deferred, Normalisation, Spec, Stored, readable
from effseg.expressions.slabs import Slab, Window, slabs
from effseg.operators.conv3d import thickness, through_statistics
from effseg.operators.head import each_its_part, over_processes
from effseg.operators.moments import Moments
from effseg.operators.norm_sums import NormSums, terms_from_sums

# How many tensors of a slab the sweeps F4 and B2 hold at a time, about.
FORWARD_SLABS, BACKWARD_SLABS = 4, 7


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
        return readable(self.spec, self.tensors, self.window, self.thickness())

    @cached_property
    def stored_addend(self) -> list[Stored]:
        assert self.addend is not None
        return readable(self.addend.spec, self.addend.tensors, None, self.thickness())

    def slabs(self) -> Iterator[Slab]:
        return slabs(self.shape[0], self.shape[2], self.thickness())

    def make_room(self, head: Head) -> None:
        """For the slabs of all sweeps, and for the gradient of the largest tensor on a coarser grid: the
        forward sweeps can use that, too."""
        tensors = (t for t in self.tensors if t.dim() == 5 and t.shape[2:] != self.spec.shape[2:])
        gradient = max((t.untyped_storage().nbytes() for t in tensors), default=0)
        _, c, _, h, w = self.shape
        voxels = self.thickness() * h * w
        slab = c * voxels * self.dtype.itemsize
        forward = FORWARD_SLABS * slab
        if collects(self, head):
            forward += NormSums.nbytes(self.weight, head.classes, voxels)
        make_room(self.weight.device, gradient, max(BACKWARD_SLABS * slab, forward - gradient))

    def thickness(self) -> int:
        """Rows of a slab."""
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
    per_slab = layer.thickness()
    pullback = Pullback(ops, spec, layer.tensors, needed[: len(layer.tensors)], per_slab, window=window)
    added_on = None
    if layer.addend is not None:
        added_on = Pullback(ops, *layer.addend, needed[len(layer.tensors) :], per_slab)
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
