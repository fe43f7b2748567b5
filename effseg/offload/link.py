"""The link between a device and its host: copies on side streams, ordered by events.

What a device is asked for runs in order on its current stream. A copy runs beside that, after a `Mark` of
that stream, and gives a mark of its own, for which the current stream waits before it touches what was
copied. A sweep ends with such a wait, so that copies of the next one come after its own, whichever way they
go. A stream for each direction, so that a full-duplex link carries both at a time.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from effseg.common.settings import Setting
from effseg.errors import InputError

Mark = Any
"""A moment in a stream: what was asked for before it."""


class Link(Protocol):
    """Copies between a device and memory of the host."""

    def mark(self) -> Mark:
        """Of the device's current stream, now."""

    def wait(self, mark: Mark) -> None:
        """Let the current stream go on after `mark`."""

    def join(self, mark: Mark) -> None:
        """Let the host go on after `mark`."""

    def send(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        """Copy from the device to the host's memory."""

    def fetch(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        """Copy from the host's memory to the device."""


class Immediate:
    """Without streams: every copy is done when it is asked for."""

    def mark(self) -> Mark:
        return None

    def wait(self, mark: Mark) -> None:
        pass

    def join(self, mark: Mark) -> None:
        pass

    def send(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        target.copy_(source)

    def fetch(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        target.copy_(source)


class CudaLink:
    """Copies of pinned memory on two streams of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.out, self.back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def mark(self) -> Mark:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, mark: Mark) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def join(self, mark: Mark) -> None:
        mark.synchronize()

    def send(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        return _copied(self.out, target, source, after)

    def fetch(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        return _copied(self.back, target, source, after)


def _copied(stream: torch.cuda.Stream, target: Tensor, source: Tensor, after: Mark) -> Mark:
    stream.wait_event(after)
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
    return stream.record_event()


link: Setting[Link | None] = Setting("effseg_link", None)
"""In the place of a device's own."""


def link_of(device: torch.device) -> Link:
    """The device's link. Raises InputError for a device that has none."""
    chosen = link.get()
    if chosen is not None:
        return chosen
    if device.type == "cpu":
        return Immediate()
    if device.type != "cuda":
        raise InputError(f"offload: expected a network on cuda or cpu, got one on {device}")
    return _cuda_link(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _cuda_link(index: int) -> Link:
    return CudaLink(torch.device("cuda", index))
