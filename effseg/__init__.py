"""effseg: train 3D segmentation networks on whole CT volumes.

Needs torch and numpy alone; data, training and evaluation import nibabel, MONAI and matplotlib when used.
"""

from effseg import functional
from effseg.algorithms import algorithm
from effseg.conversion import ConversionReport, convert, restore
from effseg.criterion import SegmentationLoss
from effseg.errors import InputError
from effseg.memory import MemoryReport, peak_training_memory
from effseg.models.effsegnet import EffSegNet
from effseg.models.registry import load
from effseg.models.unet3d import UNet3D
from effseg.modules import ConvNormAct3d, ResidualBlock3d
from effseg.version import __version__

__all__ = [
    "ConvNormAct3d",
    "ConversionReport",
    "EffSegNet",
    "InputError",
    "MemoryReport",
    "ResidualBlock3d",
    "SegmentationLoss",
    "UNet3D",
    "__version__",
    "algorithm",
    "convert",
    "functional",
    "load",
    "peak_training_memory",
    "restore",
]
