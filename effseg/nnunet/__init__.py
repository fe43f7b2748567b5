"""effseg inside nnU-Net (2.8 or newer): trainers that it finds without a change to its files.

nnU-Net looks for trainers in the folders of its environment variable nnUNet_extTrainer; `effseg nnunet`
sets it to TRAINERS.
"""

import os
from pathlib import Path

__all__ = ["TRAINERS", "VARIABLE", "announce"]

VARIABLE = "nnUNet_extTrainer"
TRAINERS = str(Path(__file__).resolve().parent / "trainers")


def announce() -> None:
    """Add TRAINERS to the folders in which nnU-Net looks for trainers, for this process and its children."""
    known = [folder for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]
    if TRAINERS not in known:
        os.environ[VARIABLE] = os.pathsep.join([*known, TRAINERS])
