"""Blocks of convolutions that keep what leaves them and run again in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effseg.common.settings import Captured, Repeated, Setting
from effseg.conversion.block_state import Buffers, State
from effseg.conversion.boundary import Noticing, mapped
from effseg.conversion.lazy import LazyTensor
from effseg.conversion.outputs import KeptOutputs
from effseg.conversion.streamed import has_last, reads_image
from effseg.expressions.base import Deferred
from effseg.expressions.layers import plain
from effseg.operators.normalisation import frozen_running_statistics

blocks_run_again: Setting[bool] = Setting("effseg_blocks_run_again", False, lasting=False)
"""Whether blocks do, in the pass that is under way."""


class Block(nn.Module):
    """What a block's class is mixed with."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        one = args[0] if len(args) == 1 and not kwargs else None
        runs_again = blocks_run_again.get() and torch.is_grad_enabled() and not has_last(self)
        if not isinstance(one, LazyTensor) or not runs_again or keeps_its_output_alone(self, one):
            return super().forward(*args, **kwargs)
        return run_again(self, super().forward, one)


def is_block(module: nn.Module) -> bool:
    """The smallest modules with two convolutions wider than a voxel, one after the other."""
    return _wide(module) > 1 and all(_wide(child) < 2 for child in module.children())


def _wide(module: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv3d) and max(m.kernel_size) > 1 for m in module.modules())


def keeps_its_output_alone(block: nn.Module, x: LazyTensor) -> bool:
    """Whether of two convolutions, one after the other, the first is made again wherever it is used: then
    there is nothing that running the block again would save."""
    first = next((m for m in block.modules() if isinstance(m, nn.Conv3d)), None)
    if first is None or _wide(block) > 2 or not isinstance(x.value, Tensor):
        return False
    # Not first.weight: a parametrised one is computed, and its buffers change, whenever it is asked for.
    return reads_image(plain(x.value), first.in_channels // first.groups, first.out_channels)


def run_again(block: nn.Module, forward: Callable[[LazyTensor], Any], x: LazyTensor) -> Any:
    """forward(x), of which only what its features are made of is kept for backward.

    Raw outputs that leave the block live on in what reads them; the second pass takes them from there. What
    leaves it may stand anywhere in tuples, lists, mappings and dataclasses; tensors that are ordinary ones
    inside of it, such as what a hook returned, stay so.
    """
    start = x.deferred(x.dtype)
    kept, state, buffers = KeptOutputs(), State(block), Buffers(block)

    def run(*tensors: Tensor) -> tuple[Any, dict[int, Deferred]]:
        """What forward returns, and by id what its lazy tensors are."""
        ends: dict[int, Deferred] = {}

        def leaving(found: Tensor) -> Tensor:
            if isinstance(found, LazyTensor):
                ends[id(found)] = _end(found)
            return found

        with kept.active(), blocks_run_again.set(False), Noticing(), state.reading():
            returned = forward(LazyTensor(Deferred(start.spec, tensors)))
            mapped(leaving, returned)
        _save_something()
        return returned, ends

    returned, ends = checkpoint(
        run, *start.tensors, use_reentrant=False,
        context_fn=lambda: (nullcontext(), Repeated(partial(_second_pass, state, buffers, Captured()))),
    )  # fmt: skip
    kept.keep(tensor for end in ends.values() for tensor in end.tensors)
    state.first_pass_is_over()
    buffers.first_pass_is_over()
    outside = {key: LazyTensor(end) for key, end in ends.items()}  # not inside, where a checkpoint is
    return mapped(lambda found: outside.get(id(found), found), returned)


def _save_something() -> None:
    """The last that a pass saves, so that the second one runs to its end.

    A checkpoint ends it at the last tensor that the first one saved, which is before the operator that saves
    it has run: F.rrelu fills its noise after that. There is little left to save there: a block mostly ends in
    an expression that has not run, else in one elementwise operator, whose backward needs as much memory.
    """
    torch.ones((), requires_grad=True, device="cpu").square()


def _end(found: LazyTensor) -> Deferred:
    value = found.value
    return value if isinstance(value, Deferred) else plain(found.read(), rows=value.shape[2])


@contextmanager
def _second_pass(state: State, buffers: Buffers, captured: Captured) -> Iterator[None]:
    """The block and settings are those of the first pass; buffers begin as they did in it; all of it stays as
    it was; lazy tensors work, whoever called backward."""
    after = buffers.exchange()
    with state.restored(), captured.restored(), frozen_running_statistics(), torch._C._EnableTorchFunction():
        try:
            yield
        finally:
            buffers.set(after)
