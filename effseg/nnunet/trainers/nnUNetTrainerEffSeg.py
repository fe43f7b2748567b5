"""For nnU-Net to find."""

from effseg.nnunet.patches import nnUNetTrainerEffSeg

__all__ = ["nnUNetTrainerEffSeg"]
