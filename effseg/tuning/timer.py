"""GPU time of functions, by CUDA events."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

ROUNDS = 20
FLUSH_BYTES = 2**28
"""More than any GPU's cache."""


def cuda_seconds(
    device: torch.device,
    functions: Sequence[Callable[[], object]],
    rounds: int = ROUNDS,
    flush_bytes: int = FLUSH_BYTES,
) -> list[list[float]]:
    """The seconds of every round, for each function; they take turns.

    So many bytes are written before each call, so that it finds none of its operands in the cache. The host
    waits after each round only: while the bytes are written it gets ahead, and launches cost no time.
    """
    flush = torch.empty(flush_bytes, dtype=torch.uint8, device=device)
    seconds: list[list[float]] = [[] for _ in functions]
    with torch.cuda.device(device):
        for _ in range(rounds):
            events = []
            for function in functions:
                flush.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                end.record()
                events.append((start, end))
            torch.cuda.synchronize(device)
            for row, (start, end) in zip(seconds, events, strict=True):
                row.append(start.elapsed_time(end) / 1e3)
    return seconds
