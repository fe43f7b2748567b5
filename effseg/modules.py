"""Building blocks as `nn.Module`s: tensors in and out, or deferred expressions in and out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from effseg import functional
from effseg.deferred import Deferred, Normalisation, raw, residual

Norm = nn.InstanceNorm3d | nn.BatchNorm3d | nn.GroupNorm
NORMS = ("instance", "batch", "group")
SLOPE = 0.01


def make_norm(norm: str, channels: int) -> Norm:
    """Affine instance, batch or group normalisation (groups of 8 channels), torch's own modules."""
    if norm == "instance":
        return nn.InstanceNorm3d(channels, affine=True)
    if norm == "batch":
        return nn.BatchNorm3d(channels)
    if norm == "group":
        return nn.GroupNorm(channels // 8 if channels % 8 == 0 else 1, channels)
    raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")


def normalisation(norm: Norm, mean: Tensor, var: Tensor, voxels: int) -> Normalisation:
    """(mean, scale, beta), each (N, C), of `norm`, from mean and biased variance (N, C) over `voxels`.

    Instance normalisation takes them as they are; batch and group normalisation merge them over samples or
    over the channels of a group: the means' mean, and the mean of var + (mean - merged mean)^2. Running
    statistics are updated in training and used in evaluation as torch does. All of it is ordinary torch
    on a few numbers, so autograd differentiates the normalisation.
    """
    if isinstance(norm, nn.GroupNorm):
        grouped = mean.unflatten(1, (norm.num_groups, -1))
        centre = grouped.mean(2, keepdim=True)
        spread = (var.unflatten(1, (norm.num_groups, -1)) + (grouped - centre).square()).mean(2, keepdim=True)
        mean, var = centre.expand_as(grouped).flatten(1), spread.expand_as(grouped).flatten(1)
    else:
        mean, var = _batch_or_instance(norm, mean, var, voxels)
    scale = torch.rsqrt(var + norm.eps)
    if not norm.affine:
        return Normalisation(mean, scale, torch.zeros_like(mean))
    return Normalisation(mean, scale * norm.weight, norm.bias.to(mean.dtype).expand_as(mean))


def _batch_or_instance(
    norm: nn.BatchNorm3d | nn.InstanceNorm3d, mean: Tensor, var: Tensor, voxels: int
) -> tuple[Tensor, Tensor]:
    samples = mean.shape[0]
    running_mean, running_var = norm.running_mean, norm.running_var
    tracked = running_mean is not None and running_var is not None
    if running_mean is not None and running_var is not None and not norm.training:
        return running_mean.to(mean.dtype).expand_as(mean), running_var.to(var.dtype).expand_as(var)
    if isinstance(norm, nn.BatchNorm3d):
        centre = mean.mean(0)
        spread = (var + (mean - centre).square()).mean(0)
        voxels *= samples
        mean, var = centre.expand_as(mean), spread.expand_as(var)
    if tracked:
        _update_running(norm, mean.detach().mean(0), var.detach().mean(0) * (voxels / max(1, voxels - 1)))
    return mean, var


@torch.no_grad()
def _update_running(norm: nn.BatchNorm3d | nn.InstanceNorm3d, mean: Tensor, unbiased_var: Tensor) -> None:
    momentum = norm.momentum or 0.0
    if isinstance(norm, nn.BatchNorm3d):  # torch's instance normalisation neither counts nor averages evenly
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1 / float(norm.num_batches_tracked)
    for buffer, value in ((norm.running_mean, mean), (norm.running_var, unbiased_var)):
        assert buffer is not None
        buffer.lerp_(value.to(buffer.dtype), momentum)


class ConvNormAct3d(nn.Module):
    """leaky_relu(norm(conv(x))): a drop-in for the chain Conv3d -> norm -> activation.

    x (N, C, D, H, W) -> (N, C', D', H', W') in the compute type (autocast's, else the weights'). `forward`
    takes and gives tensors; `deferred` takes and gives expressions, so that in a chain of units only raw
    convolution outputs are stored. Kernel sizes are odd and the padding is kernel // 2, so D' =
    ceil(D / stride). `norm` is "instance", "batch" or "group" (see `make_norm`); `negative_slope` 0 is
    ReLU, 1 is no activation. Keys of the state dict: conv.weight, conv.bias, norm.*.

    Memory kept for backward by `forward`: the input and the raw output; stock torch keeps the input, the
    raw output, the normalised output and the activated one (or three of them with an in-place activation).
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
        self, x: Tensor | Deferred, slab_elements: int | None = None
    ) -> tuple[Tensor, Normalisation]:
        """The raw convolution output, stored, and what normalises it."""
        y, mean, var = functional.conv3d(
            x, self.conv.weight, self.conv.bias, self.conv.stride, slab_elements=slab_elements
        )
        assert mean is not None
        assert var is not None
        return y, normalisation(self.norm, mean, var, y[0, 0].numel())

    def deferred(self, x: Tensor | Deferred, slab_elements: int | None = None) -> Deferred:
        return raw(*self.normalised(x, slab_elements), self.negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        return functional.materialise(self.deferred(x))


class ResidualBlock3d(nn.Module):
    """leaky_relu(x + norm(conv(unit(x)))) at constant width, with unit a `ConvNormAct3d`.

    Memory kept for backward in a chain: two raw outputs.
    """

    def __init__(self, channels: int, norm: str = "instance", negative_slope: float = SLOPE) -> None:
        super().__init__()
        self.unit = ConvNormAct3d(channels, channels, norm=norm, negative_slope=negative_slope)
        self.last = ConvNormAct3d(channels, channels, norm=norm, negative_slope=1.0)
        self.negative_slope = negative_slope

    def deferred(self, x: Deferred, slab_elements: int | None = None) -> Deferred:
        inner = self.unit.deferred(x, slab_elements)
        return residual(x, *self.last.normalised(inner, slab_elements), self.negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        dtype = functional.compute_dtype(x.device, self.unit.conv.weight)
        return functional.materialise(self.deferred(functional.plain(x, dtype)))
