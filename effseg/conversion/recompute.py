"""Blocks of convolutions that keep what leaves them and run again in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effseg.conversion.lazy import LazyTensor
from effseg.conversion.outputs import KeptOutputs
from effseg.deferred import Deferred, Spec, plain
from effseg.normalisation import frozen_running_statistics
from effseg.settings import Captured, Setting

blocks_run_again: Setting[bool] = Setting("effseg_blocks_run_again", False, lasting=False)
"""Whether blocks do, in the pass that is under way."""


class Block(nn.Module):
    """What a block's class is mixed with."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        one = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(one, LazyTensor) or not (blocks_run_again.get() and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        return run_again(self, super().forward, one)


def is_block(module: nn.Module) -> bool:
    """The smallest modules with two convolutions wider than a voxel, one after the other."""
    return _wide(module) > 1 and all(_wide(child) < 2 for child in module.children())


def _wide(module: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv3d) and max(m.kernel_size) > 1 for m in module.modules())


def run_again(block: nn.Module, forward: Callable[[LazyTensor], Any], x: LazyTensor) -> Any:
    """forward(x), of which only what its value is made of is kept for backward.

    Raw outputs that leave the block live on in what reads them; the second pass takes them from there.
    """
    value = x.value
    start = value if isinstance(value, Deferred) else plain(x.materialise())
    kept, specs = KeptOutputs(), list[Spec]()

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        with kept.active(), blocks_run_again.set(False):
            found = forward(LazyTensor(Deferred(start.spec, tensors)))
            if not isinstance(found, LazyTensor):
                raise TypeError(f"{type(block).__name__}: expected features, got {type(found).__name__}")
            value = found.value
            end = value if isinstance(value, Deferred) else plain(found.materialise())
        specs.append(end.spec)
        return end.tensors

    tensors = checkpoint(
        run, *start.tensors, use_reentrant=False, preserve_rng_state=_is_random(block),
        context_fn=lambda: (nullcontext(), _second_pass(block, Captured())),
    )  # fmt: skip
    kept.keep(tensors)
    return LazyTensor(Deferred(specs[0], tensors))


def _is_random(block: nn.Module) -> bool:
    return any(getattr(m, "p", 0) or getattr(m, "drop_prob", 0) for m in block.modules())


@contextmanager
def _second_pass(block: nn.Module, captured: Captured) -> Iterator[None]:
    """Settings are those of the first pass; running statistics and counters stay as it left them."""
    counters = [m.num_batches_tracked for m in block.modules() if isinstance(m, nn.BatchNorm3d)]
    before = [None if c is None else c.clone() for c in counters]
    with captured.restored(), frozen_running_statistics():
        try:
            yield
        finally:
            for counter, value in zip(counters, before, strict=True):
                if counter is not None and value is not None:
                    counter.copy_(value)
