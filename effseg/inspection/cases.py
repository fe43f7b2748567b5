"""The kernel specialisations that the package's networks and nnU-Net's widths need.

A case runs a host wrapper on fake tensors while launches are recorded, so that shapes, constants and
configurations are those that the wrapper would launch and are described nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from effseg.common.formats import DTYPES
from effseg.expressions.slabs import Window
from effseg.kernels import conv3d_dgrad, conv3d_fwd, conv3d_wgrad, head, norm_act, statistics, upsample
from effseg.kernels.config import LOOPS, Triple
from effseg.kernels.launch import Launch, NormAct, empty, recording
from effseg.models.effsegnet import EffSegNet
from effseg.models.levels import PRESETS

NNUNET_WIDTHS = (32, 64, 128, 256, 320, 320)
CLASSES = (15, 105)
SIZE = (64, 128, 128)
"""Of the input: as divisible by 16 as the sizes of scans are."""
SLOPE = 0.01
POINT, CUBE = Window((1, 1, 1)), Window((3, 3, 3))


@dataclass(frozen=True)
class Case:
    """op: of config.LOOPS; out_channels: classes of a head; fused: a convolution with normalisation and
    activation of its input, and with statistics of its output or the gradient through them."""

    op: str
    in_channels: int
    out_channels: int
    window: Window = POINT
    fused: bool = False

    @property
    def name(self) -> str:
        if not self.op.startswith(("conv3d", "head")):
            return f"C{self.in_channels}"
        parts = [f"{self.in_channels}->{self.out_channels}"]
        if self.op.startswith("conv3d"):
            parts.append("x".join(map(str, self.window.kernel)))
        if self.window.stride != (1, 1, 1):
            parts.append("s" + "x".join(map(str, self.window.stride)))
        return " ".join([*parts, "fused"] if self.fused else parts)


def cases(quick: bool = False) -> list[Case]:
    """All of them; `quick`: those of one layer of 32 channels."""
    found = [case for shape in convolutions() for case in _convolution(*shape)]
    widths = sorted({case.out_channels for case in found})
    for op in LOOPS:
        if op.startswith("head"):
            found += [Case(op, c, k) for c in (16, 32) for k in CLASSES]
        elif not op.startswith("conv3d"):
            found += [Case(op, c, c) for c in widths]
    if quick:
        found = [
            case
            for case in found
            if case.in_channels == 32
            and case.out_channels in (32, 15)
            and case.window in (POINT, CUBE)
            and (case.fused or not case.op.startswith("conv3d"))
        ]
    return found


def convolutions() -> list[tuple[int, int, Window]]:
    """(in channels, out channels, window) of every convolution of the presets and of nnU-Net's widths."""
    found: dict[tuple[int, int, Window], None] = {}
    with torch.device("meta"):
        networks = [EffSegNet(1, CLASSES[0], preset=preset) for preset in PRESETS]
        networks.append(EffSegNet(1, CLASSES[0], thick_axis=0))
    for network in networks:
        for layer in network.modules():
            if isinstance(layer, nn.Conv3d) and layer.out_channels >= 16:
                kernel, stride = map(_triple, (layer.kernel_size, layer.stride))
                found[layer.in_channels, layer.out_channels, Window(kernel, stride)] = None
    down = Window((3, 3, 3), (2, 2, 2))
    for i, width in enumerate(NNUNET_WIDTHS):
        found[width, width, CUBE] = None
        if i:
            found[NNUNET_WIDTHS[i - 1], width, down] = None
            found[2 * NNUNET_WIDTHS[i - 1], NNUNET_WIDTHS[i - 1], CUBE] = None
    return list(found)


def _convolution(in_channels: int, out_channels: int, window: Window) -> Iterator[Case]:
    """Every pass: fused, as networks of deferred activations run it, and on slabs that an elementwise kernel
    activates, which is worth it where a convolution reads them often."""
    for fused in (True, False) if window == CUBE and in_channels >= 16 else (True,):
        yield Case("conv3d_fwd", in_channels, out_channels, window, fused)
        if in_channels >= 16:
            yield Case("conv3d_dgrad", in_channels, out_channels, window, fused)
        yield Case("conv3d_wgrad", in_channels, out_channels, window, fused)


def recorded(case: Case, architecture: str, dtype: str) -> list[Launch]:
    """What the case launches; of each kernel the last: of a strided dgrad's classes that of most taps."""
    with FakeTensorMode(), recording(architecture) as launches:
        _call(case, DTYPES[dtype])
    return list({id(launch.kernel): launch for launch in launches}.values())


def _features(channels: int, size: Triple, dtype: torch.dtype) -> Tensor:
    return empty((1, channels, *size), dtype, torch.device("cpu"))


def _terms(channels: int) -> NormAct:
    mean, scale, beta = torch.empty(3, 1, channels).unbind(0)
    return NormAct(mean, scale, beta, SLOPE)


def _call(case: Case, dtype: torch.dtype) -> None:
    ci, co, window = case.in_channels, case.out_channels, case.window
    x = _features(ci, SIZE, dtype)
    terms = _terms(ci)
    if case.op.startswith("conv3d"):
        y = _features(co, window.output_size(SIZE), dtype)
        weight = torch.empty(co, ci, *window.kernel)
        front = window.kernel[0] // 2
        # A network's first layer reads the image as it is.
        before = terms if case.fused and ci >= 16 else None
        if case.op == "conv3d_fwd":
            conv3d_fwd.conv3d_forward(
                x, weight, y, window=window, front=front, prologue=before, statistics=case.fused
            )
        elif case.op == "conv3d_dgrad":
            after = (torch.empty_like(x), terms) if case.fused else None
            conv3d_dgrad.conv3d_dgrad(y, weight, x, window=window, front=front, epilogue=after)
        else:
            mean, scale, shift, _ = _terms(co)
            fold = conv3d_wgrad.Fold(torch.empty_like(y), mean, scale, shift, torch.empty_like(y))
            conv3d_wgrad.conv3d_wgrad(
                x, y, window=window, front=front, prologue=before, fold=fold if case.fused else None
            )
    elif case.op.startswith("head"):
        _call_head(case, x)
    elif case.op.startswith("upsample"):
        fine = _features(ci, _triple(2 * n for n in SIZE), dtype)
        rows = (0, 2 * SIZE[0])
        if case.op == "upsample":
            upsample.upsample_x2(x, fine, rows=rows, addend=torch.empty_like(fine))
        else:
            upsample.upsample_x2_transpose(fine, x, rows=rows)
    elif case.op == "norm_act":
        norm_act.norm_act(x, terms, torch.empty_like(x), addend=torch.empty_like(x))
    elif case.op == "norm_act_backward":
        others = [torch.empty_like(x) for _ in range(3)]
        norm_act.norm_act_backward(others[0], x, terms, dy=others[1], dz=others[2], sums=True)
    elif case.op == "fold":
        norm_act.fold(torch.empty_like(x), x, *terms[:3], torch.empty_like(x))
    else:
        statistics.moments(x)


def _triple(values: Iterable[int]) -> Triple:
    d, h, w = values
    return d, h, w


def _call_head(case: Case, x: Tensor) -> None:
    classes = case.out_channels
    weight, bias = torch.empty(classes, case.in_channels), torch.empty(classes)
    labels = torch.empty(SIZE, dtype=torch.uint8)
    if case.op == "head_argmax":
        head.head_argmax(x, weight, bias, labels)
        return
    arguments = (x, weight, bias, labels, torch.empty(classes), None)
    if case.op == "head_sums":
        head.head_sums(*arguments)
    else:
        sums = head.HeadGradients(
            torch.empty(classes), torch.empty(classes), torch.empty(()), torch.empty(())
        )
        head.head_backward(*arguments, sums, torch.empty_like(x))
