"""What every segmentation network of this package can do."""

import os
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from effseg.common.formats import accumulation_dtype, label_dtype
from effseg.errors import InputError
from effseg.losses import dice_cross_entropy
from effseg.models import checkpoint

if TYPE_CHECKING:
    from effseg.data.labels import Labels
    from effseg.data.preprocessing import Preprocessing


class SegmentationModel(nn.Module):
    """A network from an image (N, C, D, H, W) to K classes a voxel.

    A subclass defines ``forward(image) -> logits (N, K, D, H, W)`` and may replace `loss` and `segment` by
    ways that need less memory. Images are of any float dtype or int16, labels (N, D, H, W) of any integer
    dtype. Raises InputError where an image's shape does not fit.

    name: as `effseg.models.registry.build_model` knows it; arguments: the constructor's arguments, so that
    ``type(model)(**model.arguments)`` is the same network; extra: what was given to `save` (preprocessing,
    names of labels ...), JSON values only.
    """

    has_own_loss: ClassVar[bool] = True
    """For code that knows no networks: `loss` is what a step of this one takes."""

    follows_autocast: ClassVar[bool] = False
    """Whether the network reads torch.autocast itself, because its operators are our own. False: its
    operators are torch's, and torch casts their arguments by its rules for the device."""

    ways: ClassVar[frozenset[str]] = frozenset()
    """Arguments of the constructor that say how a prediction is computed, and change no number of it."""

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.name = name
        self.arguments = arguments
        self.extra: dict[str, Any] = {}

    def loss(self, image: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        """Dice + cross-entropy, a scalar; options: those of :func:`effseg.losses.dice_cross_entropy`."""
        return dice_cross_entropy(self(image), labels, **options)

    @torch.no_grad()
    def segment(self, image: torch.Tensor) -> torch.Tensor:
        """The most probable class of every voxel, (N, D, H, W), uint8 (int16 for more than 256 classes).

        Training or evaluation mode is left as it is.
        """
        logits = self(image)
        return logits.argmax(1).to(label_dtype(logits.shape[1]))

    @torch.no_grad()
    def probabilities(self, image: torch.Tensor) -> torch.Tensor:
        """The softmax p = exp(z) / sum exp(z) of the logits z, (N, K, D, H, W) float16, in the host's memory.

        K logits of every voxel are stored on the device. Training or evaluation mode is left as it is.
        """
        logits = self(image)
        found = torch.empty(logits.shape, dtype=torch.float16, device="cpu")
        for row in range(logits.shape[2]):
            values = logits[:, :, row]
            found[:, :, row] = values.to(accumulation_dtype(values.dtype)).softmax(1)
        return found

    @property
    def function(self) -> dict[str, Any]:
        """What the network computes beside its weights: class, and the arguments that numbers depend on."""
        numbers = {key: value for key, value in self.arguments.items() if key not in self.ways}
        return {"class": type(self).__name__, "name": self.name, "arguments": numbers}

    def lowest_level(self, size: tuple[int, int, int]) -> tuple[int, int, int] | None:
        """Voxels of the coarsest feature maps of a volume of `size`, (D, H, W) both; None where the network
        does not say."""
        return None

    def save(
        self,
        path: str | os.PathLike[str],
        extra: dict[str, Any] | None = None,
        *,
        preprocessing: "Preprocessing | None" = None,
        labels: "Labels | None" = None,
        patch_size: tuple[int, int, int] | None = None,
    ) -> None:
        """Write a checkpoint that `effseg.load` reads: safetensors, whole or not at all.

        extra: replaces ``self.extra``; must be JSON-able. The others are put into it, and are what `effseg
        predict` needs to know of a network: preprocessing, an `effseg.data.preprocessing.Preprocessing`;
        labels, an `effseg.data.labels.LabelMap`, {value in label files: name}, or names of the values 0, 1,
        ... (the background may be left out); patch_size, where it was trained on patches.
        Raises InputError for labels or windows whose number is not the network's, TypeError for another
        preprocessing.
        """
        if extra is not None:
            self.extra = dict(extra)
        if preprocessing is not None:
            from effseg.data.preprocessing import Preprocessing

            if not isinstance(preprocessing, Preprocessing):
                raise TypeError(
                    f"preprocessing: expected a Preprocessing, got {type(preprocessing).__name__}"
                )
            preprocessing.windows(self.arguments["in_channels"])
            self.extra["preprocessing"] = preprocessing.to_dict()
        if labels is not None:
            from effseg.data.labels import as_label_map

            self.extra["labels"] = as_label_map(labels, self.arguments["num_classes"]).to_dict()
        if patch_size is not None:
            self.extra["training"] = self.extra.get("training", {}) | {"patch_size": list(patch_size)}
        checkpoint.save(self, path)


def check_image(image: torch.Tensor, in_channels: int) -> None:
    """Raise InputError unless `image` is a non-empty (N, in_channels, D, H, W)."""
    if image.dim() != 5 or image.shape[1] != in_channels or image.numel() == 0:
        raise InputError(f"image: expected (N, {in_channels}, D, H, W) without a 0, got {tuple(image.shape)}")


def check_sizes(in_channels: int, num_classes: int) -> None:
    """Raise InputError unless a network of these sizes makes sense."""
    if in_channels < 1:
        raise InputError(f"in_channels: expected 1 or more, got {in_channels}")
    if num_classes < 2:
        raise InputError(f"num_classes: expected 2 or more, background included, got {num_classes}")
