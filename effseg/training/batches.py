"""From prepared cases to a step's tensors, ahead of time in background threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from effseg.data.augmentation import Augmentation, Spacing
from effseg.data.cache import CachedCase
from effseg.data.preprocessing import Outside
from effseg.training.sampling import Draw, Sampler

FOREGROUND_SHARE = 1 / 3  # of the patches are centred on a voxel of a random organ
PATCH_MARGIN = 0.15  # of the patch's size is read around it, so that a rotation has something to turn in

_PATCH = 3  # what the seed sequence is for, beside those of sampling.py

Triple = tuple[int, int, int]
Region = tuple[slice, ...]
WHOLE: Region = (slice(None),) * 4
Volume = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Batches:
    """The batches of one process: a pure function of the step.

    normalise: HU (C, D, H, W) -> float32. augment: see `effseg.data.augmentation`; None
    for none.
    patch_size: cut random patches instead of taking whole volumes. patch_margin: see `margin_of`.
    augment_on: a device to which volumes are moved first, to be augmented there when their step comes; its
    batches lie there. None: they are augmented ahead, on the CPU, and stay there.
    own_rows: of volumes of so many rows, those that this process holds; None: all. What is not augmented is
    read only there; a rotation turns the whole volume.
    """

    cases: Sequence[CachedCase]
    sampler: Sampler
    normalise: Callable[[np.ndarray], torch.Tensor]
    augment: Augmentation | None
    patch_size: Triple | None = None
    pin: bool = False
    augment_on: torch.device | None = None
    own_rows: Callable[[int], slice] | None = None
    patch_margin: float = PATCH_MARGIN

    def __call__(self, step: int) -> Volume:
        """The batch of `step`: image (N, C, D, H, W) float32 and labels (N, D, H, W)."""
        return self._finished(self._made_ahead(step))

    def ahead(self, first: int, last: int, workers: int) -> Iterator[Volume]:
        """The batches of steps `first` to `last` - 1 in order, `workers` of them being made meanwhile."""
        if workers == 0:
            yield from map(self, range(first, last))
            return
        with ThreadPoolExecutor(workers, thread_name_prefix="batches") as pool:
            steps = iter(range(first, last))
            pending = deque(pool.submit(self._made_ahead, step) for step in islice(steps, workers))
            try:
                while pending:
                    made = pending.popleft().result()
                    pending.extend(pool.submit(self._made_ahead, step) for step in islice(steps, 1))
                    batch = self._finished(made)
                    del made
                    yield batch
                    del batch
            finally:
                for future in pending:
                    future.cancel()

    def _made_ahead(self, step: int) -> list[_Sample] | Volume:
        """What can be done before the step comes: all of it but for what is left to a device."""
        samples = list(map(self._sample, self.sampler.batch(step)))
        if self.augment_on is None:
            image, labels = _stacked(map(self._augmented, samples))
            return (image.pin_memory(), labels.pin_memory()) if self.pin else (image, labels)
        pin = self.pin
        return (
            [s._replace(image=s.image.pin_memory(), labels=s.labels.pin_memory()) for s in samples]
            if pin
            else samples
        )

    def _finished(self, made: list[_Sample] | Volume) -> Volume:
        if isinstance(made, tuple):
            return made
        return _stacked(self._augmented(sample.on(self.augment_on)) for sample in made)

    def _sample(self, draw: Draw) -> _Sample:
        case = self.cases[draw.case]
        region = inside = WHOLE
        if self.patch_size is not None:
            rng = np.random.default_rng((_PATCH, draw.seed))
            start = patch_start(case.labels, case.counts, self.patch_size, rng)
            region, inside = with_margin(start, self.patch_size, case.labels.shape, self.patch_margin)
        if self.own_rows is not None:
            own: Region = (slice(None), self.own_rows(case.labels.shape[0]), slice(None), slice(None))
            region, inside = (own, WHOLE) if self.augment is None else (WHOLE, own)
        image = self.normalise(case.image[region])
        labels = torch.from_numpy(np.array(case.labels[region[1:]]))
        return _Sample(image, labels, inside, draw.seed, case.spacing, case.outside)

    def _augmented(self, sample: _Sample) -> Volume:
        image, labels = sample.image, sample.labels
        if self.augment is not None:
            image, labels = self.augment(image, labels, sample.seed, sample.spacing, sample.outside)
        return image[sample.inside].contiguous(), labels[sample.inside[1:]].contiguous()


class _Sample(NamedTuple):
    """A volume, or a patch and its surroundings, before it is augmented; inside: what is kept of it then."""

    image: torch.Tensor
    labels: torch.Tensor
    inside: Region
    seed: int
    spacing: Spacing
    outside: Outside

    def on(self, device: torch.device | None) -> _Sample:
        image, labels = (t.to(device, non_blocking=True) for t in (self.image, self.labels))
        return self._replace(image=image, labels=labels)


def _stacked(volumes: Iterable[Volume]) -> Volume:
    images, labels = zip(*volumes, strict=True)
    image = images[0][None] if len(images) == 1 else torch.stack(images)
    return image, labels[0][None] if len(labels) == 1 else torch.stack(labels)


def patch_start(labels: np.ndarray, counts: np.ndarray, size: Triple, rng: np.random.Generator) -> Triple:
    """The first voxel of a random patch inside `labels` (D, H, W), which have `counts` voxels of each class.

    A third of the patches are centred on a random voxel of a random organ, as far as the volume's edge
    allows; the others lie anywhere.
    """
    highest = [extent - wanted for extent, wanted in zip(labels.shape, size, strict=True)]
    organs = np.flatnonzero(counts[1:]) + 1
    if rng.random() >= FOREGROUND_SHARE or not len(organs):
        start = [int(rng.integers(top + 1)) for top in highest]
    else:
        voxels = np.flatnonzero(labels == organs[rng.integers(len(organs))])
        centre = np.unravel_index(voxels[rng.integers(len(voxels))], labels.shape)
        start = [
            min(max(int(middle) - wanted // 2, 0), top)
            for middle, wanted, top in zip(centre, size, highest, strict=True)
        ]
    return start[0], start[1], start[2]


def margin_of(strength: float) -> float:
    """The share of a patch's size that is read around it: augmentation of a higher `strength` turns and zooms
    further, and air would come into the middle of a body."""
    return PATCH_MARGIN * max(1.0, strength)


def with_margin(
    start: Triple, size: Triple, shape: Sequence[int], share: float = PATCH_MARGIN
) -> tuple[Region, Region]:
    """The patch with a margin, cut at the volume's edges, and the patch inside of that: (C, D, H, W)."""
    region, inside = [slice(None)], [slice(None)]
    for first, wanted, extent in zip(start, size, shape, strict=True):
        margin = round(share * wanted)
        low, high = max(first - margin, 0), min(first + wanted + margin, extent)
        region.append(slice(low, high))
        inside.append(slice(first - low, first - low + wanted))
    return tuple(region), tuple(inside)
