"""One optimiser step: forward, backward, clip, update, or nothing where the gradient is not finite."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from effseg.errors import InputError
from effseg.training.config import TrainingConfig
from effseg.training.distributed import World
from effseg.training.schedule import learning_rate
from effseg.training.state import RunState
from effseg.training.statistics import RunningStatistics

MOST_SKIPPED_IN_A_ROW = 20


class _Loss(nn.Module):
    """The model's loss as a module's forward: where DistributedDataParallel puts its hooks."""

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.options = options

    def forward(self, image: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.model.loss(image, labels, **self.options)


@dataclass(frozen=True)
class StepResult:
    learning_rate: float
    loss: float
    gradient_norm: float
    skipped: bool
    """The network is as it was before: the gradient or running statistics were not finite."""


class Stepper:
    """AdamW on a model's loss; image and labels are this process's rows, where processes share volumes.

    loss_options: keywords of ``model.loss``. With several processes the gradients are averaged and the
    loss's sums are taken over all of them, so that a step equals one process's step on the whole batch;
    batch norm is the exception: every process normalises by the statistics of its own cases, and the running
    statistics that are validated and saved are the first process's.
    """

    def __init__(
        self, model: nn.Module, config: TrainingConfig, steps: int, world: World, loss_options: dict[str, Any]
    ) -> None:
        self.config, self.steps, self.device = config, steps, world.device
        self.autocast = uses_bf16(config, world.device)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.peak_rate, weight_decay=config.weight_decay
        )
        self.world = world
        loss: nn.Module = _Loss(model, loss_options | {"process_group": world.loss_group})
        if world.several:
            ids = [world.device.index] if world.device.type == "cuda" else None
            loss = DistributedDataParallel(loss, device_ids=ids, gradient_as_bucket_view=True)
        self.loss = loss

    def __call__(self, step: int, image: torch.Tensor, labels: torch.Tensor, state: RunState) -> StepResult:
        """Do step `step` (from 0) on a batch that lies on the device; count it in `state`.

        Where the gradient or a norm's running statistics are not finite, weights and statistics stay as they
        were. Raises InputError when that happened many times in a row: this run cannot go on.
        """
        rate = learning_rate(step, self.steps, self.config.peak_rate, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        statistics = RunningStatistics(self.loss)
        with self.world.splitting(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.loss(image, labels)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        finite = statistics.keep_if_finite(norm, self.world.several)
        result = StepResult(rate, float(loss.detach()), float(norm), not finite)
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.step = step + 1
        state.skipped += not finite
        state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
        if state.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise InputError(
                f"step {step + 1}: the gradient or running statistics were not finite "
                f"{MOST_SKIPPED_IN_A_ROW} times in a row (last loss {result.loss}): lower learning_rate "
                f"({self.config.peak_rate}) or use dtype fp32"
            )
        return result


def uses_bf16(config: TrainingConfig, device: torch.device) -> bool:
    """Whether `device` computes in bf16 under autocast."""
    return config.dtype == "bf16" or (config.dtype == "auto" and device.type == "cuda")
