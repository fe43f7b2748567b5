"""Which convolutions of a network its loss can make, found out by running it once on fake tensors."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from effseg.conversion.boundary import Noticing, mapped
from effseg.conversion.examine import trial
from effseg.conversion.lazy import LazyTensor
from effseg.conversion.report import ConversionReport
from effseg.conversion.streamed import Logits, Place, Streaming, place, streaming
from effseg.conversion.values import Convolution
from effseg.errors import InputError
from effseg.memory.fakes import on_fakes

LACKS = (
    'memory: "stream" expects logits that are a 1x1x1 convolution of an activated, normalised 3D convolution '
    "of stride 1 (or of its sum with another tensor), which nothing else reads; {} returns {}"
)


def last_convolutions(model: nn.Module, report: ConversionReport, required: bool) -> frozenset[str]:
    """Names of the weights of the convolutions that a loss can make from lazy logits. report: of `examine`.

    Where there are none: an empty set, or if they are required, `InputError`.
    """
    if report.problem is not None or report.shape is None:
        if required:
            raise InputError(f'memory: "stream" expects a network that can be examined, got {report}')
        return frozenset()
    shape = report.shape
    return on_fakes(lambda fakes: _lasts(fakes, model, shape, report.model, required))


def _lasts(
    fakes: FakeTensorMode, model: nn.Module, shape: tuple[int, ...], name: str, required: bool
) -> frozenset[str]:
    outputs: list[Tensor] = []
    plan = Streaming(None)
    with trial(fakes, model, shape) as (network, image), streaming.set(plan), Noticing():
        mapped(lambda x: _note(x, outputs), network(LazyTensor(image)))
        read_once = {weight for weight, count in Counter(plan.heads).items() if count == 1} - plan.stored
        lasts = {weight for x in outputs if (weight := _last(x)) in read_once}
        names = frozenset(name for name, p in network.named_parameters() if place(p) in lasts)
        if required and not names:
            got = ", ".join(_described(x, plan) for x in outputs) or "none"
            raise InputError(LACKS.format(name, got))
    return names


def _note(output: Tensor, outputs: list[Tensor]) -> Any:
    outputs.append(output)
    return output


def _last(output: Tensor) -> Place | None:
    value = output.value if isinstance(output, LazyTensor) else None
    return place(value.layer.tail.weight) if isinstance(value, Logits) else None


def _described(output: Tensor, plan: Streaming) -> str:
    value = output.value if isinstance(output, LazyTensor) else None
    if isinstance(value, Logits):
        weight = place(value.layer.tail.weight)
        alone = plan.heads.count(weight) == 1 and weight not in plan.stored
        what = "whose weight is none of its parameters" if alone else "that others read"
        return f"a 1x1x1 convolution of a layer {what}"
    if isinstance(value, Convolution) and value.is_head:
        return f"a 1x1x1 convolution of what is no such layer ({type(value.x.spec).__name__})"
    return "a tensor made by another operator"
