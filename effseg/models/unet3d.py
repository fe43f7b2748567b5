"""The 3D U-Net that memory and accuracy are compared with."""

import torch
from torch import nn

from effseg.errors import InputError
from effseg.models.base import SegmentationModel, check_image, check_sizes


class DoubleConv(nn.Sequential):
    """Twice: conv 3x3x3 (same padding), batch norm, ReLU."""

    def __init__(self, in_channels: int, middle: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv3d(in_channels, middle, 3, padding=1),
            nn.BatchNorm3d(middle),
            nn.ReLU(inplace=True),
            nn.Conv3d(middle, out_channels, 3, padding=1),
            nn.BatchNorm3d(out_channels),
            nn.ReLU(inplace=True),
        )


class UNet3D(SegmentationModel):
    """3D U-Net of Cicek et al., MICCAI 2016, doi:10.1007/978-3-319-46723-8_49, in stock torch.

    Widths 32-64, 64-128, 128-256, 256-512 over four levels, 19.07 M parameters for 15 classes. As is usual
    today, convolutions keep the size, where the paper's shrink it. Any size works: max-pooling rounds up
    (the last window is cut at the border), and upsampled tensors are cropped to the skip's size; for sizes
    divisible by 8 this is the plain network.

    Image (N, in_channels, D, H, W) of any float dtype or int16; logits (N, num_classes, D, H, W), background
    included. Raises InputError for numbers that make no network, images of another shape, and in training a
    single image of 8 voxels or fewer along every axis (batch norm needs more than one voxel).
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        check_sizes(in_channels, num_classes)
        super().__init__("unet3d", {"in_channels": in_channels, "num_classes": num_classes})
        self.encoder = nn.ModuleList(
            [
                DoubleConv(in_channels, 32, 64),
                DoubleConv(64, 64, 128),
                DoubleConv(128, 128, 256),
                DoubleConv(256, 256, 512),
            ]
        )
        self.pool = nn.MaxPool3d(2, ceil_mode=True)
        self.up = nn.ModuleList([nn.ConvTranspose3d(c, c, kernel_size=2, stride=2) for c in (512, 256, 128)])
        self.decoder = nn.ModuleList(
            [
                DoubleConv(256 + 512, 256, 256),
                DoubleConv(128 + 256, 128, 128),
                DoubleConv(64 + 128, 64, 64),
            ]
        )
        self.head = nn.Conv3d(64, num_classes, 1)

    def lowest_level(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Voxels of the coarsest feature maps of a volume of `size`: an eighth, rounded up."""
        d, h, w = (-(-extent // 8) for extent in size)
        return d, h, w

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """image (N, C, D, H, W) -> logits (N, K, D, H, W)."""
        check_image(image, self.arguments["in_channels"])
        if self.training and image.shape[0] == 1 and max(image.shape[2:]) <= 8:
            raise InputError(
                "image: expected a batch, or more than 8 voxels along an axis, since batch norm needs more "
                f"than one voxel at the lowest level; got {tuple(image.shape)}"
            )
        x = image.to(self.head.weight.dtype)
        skips = []
        for level in range(len(self.encoder)):
            x = self._down(level, x)
            skips.append(x)
        skips.pop()
        for level in range(len(self.decoder)):
            x = self._up(level, skips.pop(), x)
        return x

    def _down(self, level: int, x: torch.Tensor) -> torch.Tensor:
        """Features of an encoder's level from those of the level above, or from the image."""
        return self.encoder[level](self.pool(x) if level else x)

    def _up(self, level: int, skip: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Features of a decoder's level, counted from the lowest; of the last one the logits."""
        depth, height, width = skip.shape[2:]
        x = self.decoder[level](torch.cat((skip, self.up[level](x)[..., :depth, :height, :width]), 1))
        return self.head(x) if level == len(self.decoder) - 1 else x
