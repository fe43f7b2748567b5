"""Weighted logits of overlapping windows, as many planes as a window is thick."""

import torch
from torch import Tensor


class Ring:
    """Sums of weights times logits over planes (H, W), of which a ring of `thickness` is held.

    Windows come in the order of their first plane. Plane p lies in slot p mod `thickness`: the slots that
    a window leaves behind are the ones that the next one, further on, begins to fill.
    Memory: (K + 1) x thickness x H x W float32.
    """

    def __init__(self, classes: int, thickness: int, height: int, width: int, device: torch.device) -> None:
        self.thickness = thickness
        self.sums = torch.zeros(classes, thickness, height, width, device=device)
        self.weights = torch.zeros(thickness, height, width, device=device)

    def add(self, start: tuple[int, int, int], logits: Tensor, weights: Tensor) -> None:
        """A window's logits (K, d, h, w), d = thickness, and weights (d, h, w); start: of its first voxel."""
        plane, row, column = start
        height, width = weights.shape[1:]
        rows, columns = slice(row, row + height), slice(column, column + width)
        turn = plane % self.thickness
        split = self.thickness - turn
        parts = [(slice(turn, None), slice(0, split)), (slice(0, turn), slice(split, None))]
        for slots, planes in parts[: 2 if turn else 1]:
            self.sums[:, slots, rows, columns].addcmul_(logits[:, planes], weights[planes])
            self.weights[slots, rows, columns] += weights[planes]

    def logits(self, plane: int) -> Tensor:
        """(K, H, W), of a plane that no further window covers."""
        slot = plane % self.thickness
        return self.sums[:, slot] / self.weights[slot]

    def clear(self, plane: int) -> None:
        slot = plane % self.thickness
        self.sums[:, slot].zero_()
        self.weights[slot].zero_()
