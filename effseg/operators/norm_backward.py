"""The backward pass of a normalisation whose terms a sweep makes, and whose gradients it finds."""

from __future__ import annotations

import torch
from torch import Tensor

from effseg.expressions.base import Normalisation
from effseg.operators.normalisation import Merging, Running, layer_terms


class NormBackward:
    """From the gradients of (mean, scale, beta) to those of what they were made of, by autograd on a few
    numbers; those of the norm's weight and bias, and of the convolution's bias, are kept here."""

    def __init__(
        self,
        how: Merging,
        running: Running,
        mean: Tensor,
        var: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        offset: Tensor | None = None,
    ) -> None:
        self.leaves = [
            None if t is None else t.detach().requires_grad_() for t in (mean, var, gamma, beta, offset)
        ]
        with torch.enable_grad():
            self.graph = layer_terms(how, running, *self.leaves)  # type: ignore[arg-type]
        self.terms = Normalisation(*(t.detach() for t in self.graph))
        self.grad_gamma: Tensor | None = None
        self.grad_beta: Tensor | None = None
        self.grad_offset: Tensor | None = None

    def __call__(self, grads: Normalisation) -> tuple[Tensor | None, Tensor | None]:
        live = [i for i, t in enumerate(self.graph) if t.requires_grad]
        present = [t for t in self.leaves if t is not None]
        outputs, weights = [self.graph[i] for i in live], [grads[i] for i in live]
        found = iter(torch.autograd.grad(outputs, present, weights, allow_unused=True) if live else [])
        mean, var, self.grad_gamma, self.grad_beta, self.grad_offset = (
            None if t is None else next(found, None) for t in self.leaves
        )
        return mean, var
