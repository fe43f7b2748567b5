"""Where nnU-Net's sliding window stops, and what its voxels weigh."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int, int]
WEIGHT_OF_CENTRE = 10  # nnU-Net's, so that float16 holds the weights of corners


@dataclass(frozen=True)
class Windows:
    """A window that slides over a volume (D, H, W) that is at least as large as it.

    patch: the window's size, of three axes or, in a 2D configuration, of the last two; step: largest distance
    of neighbouring windows as a share of it.
    """

    volume: Size
    patch: tuple[int, ...]
    step: float

    @property
    def size(self) -> Size:
        d, h, w = (1, *self.patch) if self.flat else self.patch
        return d, h, w

    @property
    def flat(self) -> bool:
        return len(self.patch) == 2

    @cached_property
    def starts(self) -> list[list[int]]:
        """First voxels of windows along D, H and W, ascending; every plane in a 2D configuration."""
        from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

        found: list[list[int]] = compute_steps_for_sliding_window(
            self.volume[-len(self.patch) :], self.patch, self.step
        )
        return [list(range(self.volume[0])), *found] if self.flat else found

    def weights(self) -> Tensor:
        """(d, h, w) float32: a Gaussian as nnU-Net rounds it, nowhere 0."""
        from nnunetv2.inference.sliding_window_prediction import compute_gaussian

        rounded = compute_gaussian(
            self.patch, 1 / 8, WEIGHT_OF_CENTRE, dtype=torch.float16, device=torch.device("cpu")
        )
        return rounded.float().reshape(self.size)


def padded(image: Tensor, patch: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
    """(C, D, H, W) with zeros around axes that are shorter than a window, and where the image lies in it."""
    needed = [1] * (3 - len(patch)) + list(patch)
    missing = [max(0, size - extent) for size, extent in zip(needed, image.shape[1:], strict=True)]
    inside = tuple(slice(m // 2, m // 2 + e) for m, e in zip(missing, image.shape[1:], strict=True))
    if not any(missing):
        return image, inside
    around = [side for m in reversed(missing) for side in (m // 2, m - m // 2)]
    return F.pad(image, around), inside
