"""A running mean of the weights, which often segments better than the weights of any one step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """An exponential running mean of a model's parameters; normalisation buffers are the model's own.

    decay: share of the mean that a step keeps. Early steps keep less, (1 + step) / (10 + step), so that the
    mean forgets the random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = list(model.parameters())
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the mean into the model for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self) -> list[torch.Tensor]:
        return self.values

    @torch.no_grad()
    def load_state(self, values: list[torch.Tensor]) -> None:
        for mine, value in zip(self.values, values, strict=True):
            mine.copy_(value)

    @torch.no_grad()
    def _swap(self) -> None:
        for value, parameter in zip(self.values, self.parameters, strict=True):
            kept = parameter.clone()
            parameter.copy_(value)
            value.copy_(kept)
