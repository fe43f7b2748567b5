"""What torch says of a GPU, asked once each: an answer takes longer than a small kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from effseg.kernels.tuned import gpu_slug


def gpu(device: torch.device) -> str:
    """The name of a GPU's tuned files."""
    return gpu_slug(_asked(torch.cuda.get_device_name, device))


def capability(device: torch.device) -> str:
    """ "sm_90" and the like."""
    major, minor = _asked(torch.cuda.get_device_capability, device)
    return f"sm_{major}{minor}"


def multiprocessors(device: torch.device) -> int:
    count: int = _asked(torch.cuda.get_device_properties, device).multi_processor_count
    return count


def _asked(question: Callable[[torch.device], Any], device: torch.device) -> Any:
    # Without an index it is the current device, which changes.
    return question(device) if device.index is None else _answer(question, device)


@cache
def _answer(question: Callable[[torch.device], Any], device: torch.device) -> Any:
    return question(device)
