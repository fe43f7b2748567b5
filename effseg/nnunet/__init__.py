"""effseg inside nnU-Net (2.8 or newer): trainers that it finds without a change to its files, and prediction.

nnU-Net looks for trainers in the folders of its environment variable nnUNet_extTrainer; `effseg nnunet`
sets it to TRAINERS. `Predictor` segments scans with any model that nnU-Net has trained.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effseg.nnunet.prediction.predictor import Predictor

__all__ = ["TRAINERS", "VARIABLE", "Predictor", "announce"]

VARIABLE = "nnUNet_extTrainer"
TRAINERS = str(Path(__file__).resolve().parent / "trainers")


def __getattr__(name: str) -> Any:
    """`Predictor` is imported when asked for: torch takes a second."""
    if name != "Predictor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from effseg.nnunet.prediction.predictor import Predictor

    return Predictor


def announce() -> None:
    """Add TRAINERS to the folders in which nnU-Net looks for trainers, for this process and its children."""
    known = [folder for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]
    if TRAINERS not in known:
        os.environ[VARIABLE] = os.pathsep.join([*known, TRAINERS])
