"""The networks by name."""

from collections.abc import Callable

from effseg.errors import InputError
from effseg.models.base import SegmentationModel

__all__ = ["MODEL_NAMES", "build_model"]


def _effsegnet(preset: str) -> Callable[[int, int], SegmentationModel]:
    def build(in_channels: int, num_classes: int) -> SegmentationModel:
        from effseg.models.effsegnet import EffSegNet

        return EffSegNet(in_channels, num_classes, preset=preset)

    return build


def _unet3d(in_channels: int, num_classes: int) -> SegmentationModel:
    from effseg.models.unet3d import UNet3D

    return UNet3D(in_channels, num_classes)


_FACTORIES: dict[str, Callable[[int, int], SegmentationModel]] = {
    "effseg-base": _effsegnet("base"),
    "effseg-large": _effsegnet("large"),
    "effseg-large-w32": _effsegnet("large-w32"),
    "effseg-tiny": _effsegnet("tiny"),
    "unet3d": _unet3d,
}

MODEL_NAMES = tuple(_FACTORIES)


def build_model(name: str, in_channels: int, num_classes: int) -> SegmentationModel:
    """A new network; name: one of MODEL_NAMES; num_classes: background included. Raises InputError."""
    if name not in _FACTORIES:
        raise InputError(f"model: expected one of {', '.join(MODEL_NAMES)}, got {name!r}")
    return _FACTORIES[name](in_channels, num_classes)
