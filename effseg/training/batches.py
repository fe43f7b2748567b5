"""From prepared cases to a step's tensors, ahead of time in background threads."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from effseg.training.sampling import Draw, Sampler

FOREGROUND_SHARE = 1 / 3  # of the patches are centred on a voxel of a random organ
PATCH_MARGIN = 0.15  # of the patch's size is read around it, so that a rotation has something to turn in

_PATCH = 3  # what the seed sequence is for, beside those of sampling.py

Triple = tuple[int, int, int]
Volume = tuple[torch.Tensor, torch.Tensor]


class PreparedCase(Protocol):
    """What a batch needs of a case."""

    @property
    def name(self) -> str: ...
    @property
    def image(self) -> np.ndarray:
        """(C, D, H, W) HU, int16 or float32, often memory-mapped."""
    @property
    def labels(self) -> np.ndarray:
        """(D, H, W) classes."""
    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm along D, H, W."""
    @property
    def organs(self) -> Sequence[int]:
        """The classes above background that the case shows."""


@dataclass(frozen=True)
class Batches:
    """The batches of one process: a pure function of the step.

    normalise: HU (C, D, H, W) -> float32. augment: (image, labels, seed) -> the same altered, or None.
    patch_size: cut random patches instead of taking whole volumes.
    """

    cases: Sequence[PreparedCase]
    sampler: Sampler
    normalise: Callable[[torch.Tensor], torch.Tensor]
    augment: Callable[[torch.Tensor, torch.Tensor, int], Volume] | None
    patch_size: Triple | None = None
    pin: bool = False

    def __call__(self, step: int) -> Volume:
        """The batch of `step`: image (N, C, D, H, W) float32 and labels (N, D, H, W)."""
        images, labels = zip(*map(self._sample, self.sampler.batch(step)), strict=True)
        image = images[0][None] if len(images) == 1 else torch.stack(images)
        label = labels[0][None] if len(labels) == 1 else torch.stack(labels)
        return (image.pin_memory(), label.pin_memory()) if self.pin else (image, label)

    def ahead(self, first: int, last: int, workers: int) -> Iterator[Volume]:
        """The batches of steps `first` to `last` - 1 in order, `workers` of them being made meanwhile."""
        if workers == 0:
            yield from map(self, range(first, last))
            return
        with ThreadPoolExecutor(workers, thread_name_prefix="batches") as pool:
            steps = iter(range(first, last))
            pending = deque(pool.submit(self, step) for step, _ in zip(steps, range(workers), strict=False))
            try:
                while pending:
                    batch = pending.popleft().result()
                    pending.extend(pool.submit(self, step) for step, _ in zip(steps, range(1), strict=False))
                    yield batch
                    del batch
            finally:
                for future in pending:
                    future.cancel()

    def _sample(self, draw: Draw) -> Volume:
        case = self.cases[draw.case]
        if self.patch_size is None:
            return self._load(case, (slice(None),) * 3, draw.seed)
        rng = np.random.default_rng((_PATCH, draw.seed))
        start = patch_start(case.labels, case.organs, self.patch_size, rng)
        region, inside = with_margin(start, self.patch_size, case.labels.shape)
        image, labels = self._load(case, region, draw.seed)
        return image[(slice(None), *inside)].contiguous(), labels[inside].contiguous()

    def _load(self, case: PreparedCase, region: tuple[slice, ...], seed: int) -> Volume:
        # Copies: a memory-mapped file is read-only, and torch warns about tensors that could write to it.
        image = self.normalise(torch.from_numpy(np.array(case.image[(slice(None), *region)])))
        labels = torch.from_numpy(np.array(case.labels[region]))
        return (image, labels) if self.augment is None else self.augment(image, labels, seed)


def patch_start(labels: np.ndarray, organs: Sequence[int], size: Triple, rng: np.random.Generator) -> Triple:
    """The first voxel of a random patch inside `labels` (D, H, W), which show `organs`.

    A third of the patches are centred on a random voxel of a random organ, as far as the volume's edge
    allows; the others lie anywhere.
    """
    highest = [extent - wanted for extent, wanted in zip(labels.shape, size, strict=True)]
    if rng.random() >= FOREGROUND_SHARE or not organs:
        start = [int(rng.integers(top + 1)) for top in highest]
    else:
        voxels = np.flatnonzero(labels == organs[rng.integers(len(organs))])
        centre = np.unravel_index(voxels[rng.integers(len(voxels))], labels.shape)
        start = [
            min(max(int(middle) - wanted // 2, 0), top)
            for middle, wanted, top in zip(centre, size, highest, strict=True)
        ]
    return start[0], start[1], start[2]


def with_margin(start: Triple, size: Triple, shape: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The patch with a margin, cut at the volume's edges, and the place of the patch inside of that."""
    region, inside = [], []
    for first, wanted, extent in zip(start, size, shape, strict=True):
        margin = round(PATCH_MARGIN * wanted)
        low, high = max(first - margin, 0), min(first + wanted + margin, extent)
        region.append(slice(low, high))
        inside.append(slice(first - low, first - low + wanted))
    return tuple(region), tuple(inside)
