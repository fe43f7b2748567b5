"""A contender's network on a device, ready to run, and what it takes of a GPU's memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from effseg.benchmarking.registry import Case
from effseg.memory.step import label_dtype_for, make_optimizer

Batch = tuple[Tensor, Tensor]
TASKS = ("train", "infer")


class Trainee:
    """batches: by the type of their labels; where there is none of the type that the network's loss reads,
    one of random numbers is put there."""

    def __init__(
        self, case: Case, dtype: str, device: torch.device, batches: dict[torch.dtype, Batch] | None = None
    ) -> None:
        self.contender, self.dtype, self.device = case.contender, dtype, device
        self.model = case.contender.make(case.workload.classes).to(device)
        self.optimizer = make_optimizer("adamw", self.model.parameters())
        batches, wanted = {} if batches is None else batches, label_dtype_for(self.model, None)
        if wanted not in batches:
            batches[wanted] = case.contender.batch(self.model, case.workload, device)
        self.image, self.labels = batches[wanted]

    def turn(self, task: str) -> Callable[[], object]:
        """task: one of TASKS."""
        return {"train": self.train, "infer": self.infer}[task]

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def gradients(self) -> Tensor:
        """Forward, loss and backward; the loss."""
        self.model.train()
        return self.contender.step(self.model, self.image, self.labels, self.dtype)

    def train(self) -> None:
        """A training step with AdamW's update, as `effseg.peak_training_memory` predicts it."""
        self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def infer(self) -> Tensor:
        """Classes of the image, (1, D, H, W)."""
        self.model.eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            return self.contender.infer(self.model, self.image)

    def tensors(self) -> Iterator[Tensor]:
        """All that stays between two steps."""
        yield from (self.image, self.labels, *self.model.parameters(), *self.model.buffers())
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


class GpuBytes(NamedTuple):
    """Of torch's allocator."""

    allocated: int
    reserved: int


def gpu_peak(trainee: Trainee, task: str, alone: bool = False) -> GpuBytes:
    """The peaks of the second of two runs, the first of which makes AdamW's state, and compiles; without what
    other networks hold. alone: the process has no other, and all that torch holds counts."""
    turn, device = trainee.turn(task), trainee.device
    gc.collect()  # graphs may hold cycles
    torch.cuda.empty_cache()
    others = 0, 0
    if not alone:
        own = sum(t.nbytes for t in trainee.tensors() if t.is_cuda)
        others = torch.cuda.memory_allocated(device) - own, torch.cuda.memory_reserved(device) - own
    for _ in range(2):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        turn()
    torch.cuda.synchronize(device)
    return GpuBytes(
        torch.cuda.max_memory_allocated(device) - others[0],
        torch.cuda.max_memory_reserved(device) - others[1],
    )
