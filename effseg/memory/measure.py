"""The same training step for real, on this machine's CPU, to hold the prediction against."""

import bisect
import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from effseg.memory.step import DTYPES, Loss, label_dtype_for, make_optimizer, training_loss

CONVOLUTIONS = frozenset({"aten::convolution", "aten::convolution_backward"})


@dataclass(frozen=True)
class MeasuredMemory:
    """Peak bytes of a step as torch's CPU allocator saw it.

    peak: everything; outside_convolutions: the highest value at a moment when no convolution ran, so without
    their scratch memory; loss: the step's loss.
    """

    peak: int
    outside_convolutions: int
    loss: float


def measure_training_memory(
    make_model: Callable[[], nn.Module],
    shape: Sequence[int],
    num_classes: int,
    *,
    dtype: str = "fp32",
    loss: Loss | None = None,
    loss_options: dict[str, Any] | None = None,
    optimizer: str = "adamw",
    image_dtype: torch.dtype = torch.float32,
    label_dtype: torch.dtype | None = None,
) -> MeasuredMemory:
    """Run one warm-up step and one profiled step on random data; arguments as in `peak_training_memory`.

    dtype ``bf16`` uses the CPU's own autocast: its rules for torch's operators are not CUDA's, so compare it
    with a prediction only for networks that follow autocast themselves.
    """
    model = make_model().train()
    n, _, *size = shape
    image = torch.randn(tuple(shape)).to(image_dtype)
    labels = torch.randint(0, num_classes, (n, *size)).to(label_dtype_for(model, label_dtype))
    updates = make_optimizer(optimizer, model.parameters())

    def step() -> float:
        with torch.autocast("cpu", DTYPES[dtype], enabled=dtype == "bf16"):
            value = training_loss(model, image, labels, loss, loss_options or {})
        value.backward()
        updates.step()
        updates.zero_grad(set_to_none=True)
        return value.item()

    step()
    gc.collect()
    state = [v for s in updates.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    before = _storage_bytes([image, labels, *model.parameters(), *model.buffers(), *state])
    # acc_events: without it some versions of torch warn that they drop what another cycle saw.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        value = step()
    peak, outside = _peaks(profiler.profiler.kineto_results.events())
    return MeasuredMemory(before + peak, before + outside, value)


def _peaks(events: Iterable[Any]) -> tuple[int, int]:
    """Peaks of the running sum of allocations: of all, and of those outside convolutions."""
    events = list(events)
    spans = sorted((e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() in CONVOLUTIONS)
    starts = [start for start, _ in spans]
    now = peak = outside = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
        i = bisect.bisect_right(starts, event.start_ns()) - 1
        if i < 0 or event.start_ns() > spans[i][1]:
            outside = max(outside, now)
    return peak, outside


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
