"""Whole cases out of nnU-Net's preprocessed folders."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from effseg.data.augmentation import Augmentation, Spacing, augmentation
from effseg.data.mirroring import Pairs
from effseg.data.preprocessing import AIR, Outside
from effseg.training.batches import Batches
from effseg.training.sampling import Sampler

FILE_X = 2  # nnU-Net's readers give arrays (C, z, y, x), x being the file's first axis


@dataclass(frozen=True, eq=False)
class PreprocessedCase:
    """A case as `Batches` takes it, read when asked for. dataset: nnU-Net's; spacing: mm along D, H, W."""

    dataset: Any
    name: str
    spacing: Spacing
    outside: Outside = None  # `augmentation_of` finds it in the whole volume, which it is always given

    @property
    def image(self) -> Any:
        """(C, D, H, W) float32, normalised; read from disk when indexed."""
        return self.dataset.load_case(self.name)[0]

    @property
    def labels(self) -> np.ndarray:
        """(D, H, W), uint8 where that is enough. nnU-Net marks what its crop has left out with -1."""
        labels = np.maximum(self.dataset.load_case(self.name)[1][:][0], 0)
        return labels.astype(np.uint8 if labels.max() < 256 else np.int16)


def count_voxels(cases: Sequence[PreprocessedCase], classes: int) -> np.ndarray:
    """Voxels of every class in all cases, (K,); ignored ones have the label K."""
    return np.sum([np.bincount(case.labels.ravel(), minlength=classes)[:classes] for case in cases], axis=0)


def batches(
    cases: Sequence[PreprocessedCase],
    sampler: Sampler,
    augment: Augmentation | None,
    steps: range,
    workers: int,
    pin: bool,
) -> Iterator[dict[str, Tensor]]:
    """One whole volume a step, as nnU-Net's trainers take it: data (1, C, D, H, W), target (1, D, H, W)."""
    source = Batches(cast(Any, cases), sampler, _copied, augment, pin=pin)
    for image, labels in source.ahead(steps.start, steps.stop, workers):
        yield {"data": image, "target": labels}


def augmentation_of(mirror: Pairs | None, transpose_forward: Sequence[int]) -> Augmentation:
    """effseg's augmentation of normalised volumes whose axes are in the order of nnU-Net's plans.

    Intensities are moved so that each channel's lowest is what effseg takes for air, and back. With `mirror`,
    volumes are mirrored along the file's first axis, left to right in most: see `augmentation`. `outside` is
    not asked for: it is the lowest.
    """
    standard = augmentation(mirror)
    x = list(transpose_forward).index(FILE_X)

    def augment(
        image: Tensor,
        labels: Tensor,
        seed: int,
        spacing: Spacing = (1.0, 1.0, 1.0),
        outside: Outside = None,
    ) -> tuple[Tensor, Tensor]:
        to_air = AIR - image.amin((1, 2, 3), keepdim=True)
        others = [step for axis, step in enumerate(spacing) if axis != x]
        moved, moved_labels = standard(
            (image + to_air).movedim(1 + x, 1), labels.movedim(x, 0), seed, (spacing[x], *others)
        )
        image = moved.movedim(1, 1 + x).contiguous().sub_(to_air)
        return image, moved_labels.movedim(0, x).contiguous()

    return augment


def _copied(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(image, np.float32))
