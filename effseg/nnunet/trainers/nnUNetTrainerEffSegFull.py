"""For nnU-Net to find."""

from effseg.nnunet.volumes import nnUNetTrainerEffSegFull

__all__ = ["nnUNetTrainerEffSegFull"]
