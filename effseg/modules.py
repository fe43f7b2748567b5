"""Building blocks as `nn.Module`s: tensors in and out, or deferred expressions in and out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effseg import functional, operators
from effseg.common.settings import Captured, Repeated
from effseg.expressions.base import Deferred, Normalisation
from effseg.expressions.layers import convolved, plain, raw, residual
from effseg.offload.memory import HostMemory
from effseg.operators.level import Parameters, Unit
from effseg.operators.normalisation import (
    frozen_running_statistics,
    make_norm,
    merging,
    normalisation,
    track,
)

SLOPE = 0.01


def refuse_hooks(name: str, module: nn.Module) -> None:
    """Raise `ValueError` for hooks on a module that is read and not called: they would be left out."""
    kinds = (
        module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks,
    )  # fmt: skip
    if any(kinds):
        raise ValueError(
            f"{name}: expected no hooks (pruning, spectral_norm and weight_norm add some; "
            f"torch.nn.utils.parametrizations do not), got {sum(map(len, kinds))}"
        )


class ConvNormAct3d(nn.Module):
    """leaky_relu(norm(conv(x))): a drop-in for the chain Conv3d -> norm -> activation.

    x (N, C, D, H, W) -> (N, C', D', H', W') in the compute type (autocast's, else the weights'). `forward`
    takes and gives tensors; `deferred` takes and gives expressions, so that in a chain of units only raw
    convolution outputs are stored. Kernel sizes are odd and the padding is kernel // 2, so D' =
    ceil(D / stride). `norm` is "instance", "batch" or "group" (see `make_norm`); `negative_slope` 0 is
    ReLU, 1 is no activation. Keys of the state dict: conv.weight, conv.bias, norm.*.

    Memory kept for backward by `forward`: the input and the raw output; stock torch keeps the input, the
    raw output, the normalised output and the activated one (or three of them with an in-place activation).
    Raises `ValueError` for options and shapes that do not fit, and for hooks on the convolution or the norm,
    which are not called as modules.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        bias: bool = False,
        norm: str = "instance",
        negative_slope: float = SLOPE,
    ) -> None:
        super().__init__()
        window = functional.convolution_window(kernel_size, stride)
        self.conv = nn.Conv3d(
            in_channels, out_channels, window.kernel, window.stride, window.padding, bias=bias
        )
        self.norm = make_norm(norm, out_channels)
        if not negative_slope >= 0:
            raise ValueError(f"negative_slope: expected 0 or more, got {negative_slope}")
        self.negative_slope = negative_slope

    def normalised(
        self, x: Tensor | Deferred, slab_elements: int | None = None, weight: Tensor | None = None
    ) -> tuple[Tensor, Normalisation, int]:
        """The raw convolution output (N, C', D', H', W'), stored, what normalises it, and D' (of the whole
        volume where it is split). weight: the convolution's, where it has been asked for it already."""
        self._refuse_hooks()
        weight = self.conv.weight if weight is None else weight
        window = functional.convolution_window(self.conv.kernel_size, self.conv.stride)
        d, h, w = window.output_size((x.shape[2], x.shape[3], x.shape[4]))
        # Only expressions read y, which multiply its gradient by the norm's scale: so that is its own.
        y, mean, var = functional.convolve(
            x, weight, self.conv.bias, self.conv.stride, slab_elements=slab_elements, consumes=True
        )
        assert mean is not None
        assert var is not None
        return y, normalisation(self.norm, mean, var, d * h * w), d

    def deferred(
        self,
        x: Tensor | Deferred,
        slab_elements: int | None = None,
        host: HostMemory | None = None,
        weight: Tensor | None = None,
    ) -> Deferred:
        """leaky_relu(norm(conv(x))) as an expression over the stored conv(x). host: where that is stored (x
        an expression, no bias), None: on its device; weight: see `normalised`."""
        if host is not None:
            y, norm, held = self.held(x, host, slab_elements)
            return raw(y, norm, self.negative_slope, held=held)
        y, norm, rows = self.normalised(x, slab_elements, weight)
        return raw(y, norm, self.negative_slope, rows)

    def held(
        self, x: Tensor | Deferred, host: HostMemory, slab_elements: int | None = None
    ) -> tuple[Tensor, Normalisation, Tensor]:
        """What stands for the raw output, what normalises it, and the raw output in the host's memory."""
        self._refuse_hooks()
        assert isinstance(x, Deferred)
        assert self.conv.bias is None
        y, mean, var, held = functional.convolve_to_host(
            x, self.conv.weight, self.conv.stride, host, slab_elements
        )
        return y, normalisation(self.norm, mean, var, math.prod(y.shape[2:])), held

    def streamed_layer(self, x: Deferred, slab_elements: int | None = None) -> Deferred:
        """The same without a gradient, storing nothing: a sweep for the statistics, and the output is made
        again where it is used."""
        self._refuse_hooks()
        window = functional.convolution_window(self.conv.kernel_size, self.conv.stride)
        weight = self.conv.weight  # once: a parametrisation may give another one each time
        mean, var = operators.layer_statistics(x, weight, window, slab_elements)
        voxels = math.prod(window.output_size((x.shape[2], x.shape[3], x.shape[4])))
        norm = normalisation(self.norm, mean, var, voxels)
        return convolved(x, weight, window, norm, self.negative_slope)

    def streamed(self, image: Deferred, slab_elements: int | None = None) -> Deferred:
        """The same of a stored image (which gets no gradient), storing nothing: the output is made again
        where it is used, from the image and statistics that one sweep collects."""
        self._refuse_hooks()
        window = functional.convolution_window(self.conv.kernel_size, self.conv.stride)
        weight = self.conv.weight  # once, as above
        mean, var = functional.stem_statistics(image, weight, self.conv.stride, slab_elements=slab_elements)
        d, h, w = image.shape[2:]
        norm = normalisation(self.norm, mean, var, math.prod(window.output_size((d, h, w))))
        return convolved(image, weight, window, norm, self.negative_slope)

    def _refuse_hooks(self) -> None:
        """The convolution and the norm are not called as modules."""
        for name, module in self.named_children():
            refuse_hooks(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return functional.materialise(self.deferred(x))


class ResidualBlock3d(nn.Module):
    """leaky_relu(x + norm(conv(unit(x)))) at constant width, with unit a `ConvNormAct3d`.

    x (N, C, D, H, W) -> the same shape, in the compute type. Memory kept for backward in a chain: two raw
    outputs. Raises `ValueError` as `ConvNormAct3d` does.
    """

    def __init__(self, channels: int, norm: str = "instance", negative_slope: float = SLOPE) -> None:
        super().__init__()
        self.unit = ConvNormAct3d(channels, channels, norm=norm, negative_slope=negative_slope)
        self.last = ConvNormAct3d(channels, channels, norm=norm, negative_slope=1.0)
        self.negative_slope = negative_slope

    def deferred(
        self,
        x: Deferred,
        slab_elements: int | None = None,
        host: HostMemory | None = None,
        weights: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Deferred:
        """The block's output as an expression over x and its two stored raw outputs. host: where those are
        stored, None: on their device; weights: of its convolutions, where these have been asked for them."""
        for name, unit in self.named_children():
            refuse_hooks(name, unit)
        inner = self.unit.deferred(x, slab_elements, host, weights[0])
        if host is not None:
            y, norm, held = self.last.held(inner, host, slab_elements)
            return residual(x, y, norm, self.negative_slope, held)
        y, norm, _ = self.last.normalised(inner, slab_elements, weights[1])
        return residual(x, y, norm, self.negative_slope)

    def recomputed(self, x: Deferred, slab_elements: int | None = None) -> Deferred:
        """The same with one tensor kept, the block's output; the inside is run again in backward."""

        def run(first: Tensor, second: Tensor, *tensors: Tensor) -> Tensor:
            block = self.deferred(Deferred(x.spec, tensors), slab_elements, weights=(first, second))
            return functional.materialise(block, slab_elements=slab_elements)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), Repeated(partial(_second_pass, Captured()))

        # torch.compile takes no contexts here, and updates running statistics once without them.
        options: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": contexts}
        # Not asked for again in backward, where a parametrisation may give others.
        tensors = (self.unit.conv.weight, self.last.conv.weight, *x.tensors)
        value = checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=False, **options)
        return plain(value, x.dtype, x.shape[2])

    def forward(self, x: Tensor) -> Tensor:
        dtype = functional.compute_dtype(x.device, next(self.unit.conv.parameters()))
        return functional.materialise(self.deferred(functional.plain(x, dtype)))


def recomputed(
    enter: ConvNormAct3d, block: ResidualBlock3d, x: Deferred, slab_elements: int | None = None
) -> Deferred:
    """The block's output on the unit's, with nothing else kept: both are run again in backward."""
    units = (enter, block.unit, block.last)
    for unit in units:
        unit._refuse_hooks()
    slopes = (enter.negative_slope, block.unit.negative_slope, block.negative_slope)
    windows = [functional.convolution_window(u.conv.kernel_size, u.conv.stride) for u in units]
    described = [
        Unit(window, *merging(unit.norm), slope)
        for window, unit, slope in zip(windows, units, slopes, strict=True)
    ]
    parameters = [Parameters(unit.conv.weight, unit.norm.weight, unit.norm.bias) for unit in units]
    value, statistics = operators.level(x, described, parameters, slab_elements)
    for unit, found in zip(units, statistics, strict=True):
        track(unit.norm, *found, math.prod(value.shape[2:]))
    return value


@contextmanager
def _second_pass(captured: Captured) -> Iterator[None]:
    with captured.restored(), frozen_running_statistics():
        yield
