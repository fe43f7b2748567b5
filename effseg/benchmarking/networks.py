"""Other people's networks with their usual settings, one channel; each imports its package when called."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

DNA = "dynamic_network_architectures.architectures.unet"
MONAI = "monai.networks.nets"
NNUNET_WIDTHS = (32, 64, 128, 256, 320, 320)


def plain_conv_unet(
    classes: int,
    features: Sequence[int] = NNUNET_WIDTHS,
    deep_supervision: bool = False,
    strides: Sequence[int | Sequence[int]] | None = None,
) -> nn.Module:
    """nnU-Net's standard network, as its planner configures it. strides: of every stage; None: 1, then 2."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    stages = len(features)
    return PlainConvUNet(
        1, stages, features, nn.Conv3d, 3, strides or (1, *[2] * (stages - 1)), 2, classes, 2,
        conv_bias=True, norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=deep_supervision,
    )  # fmt: skip


def residual_encoder_unet(classes: int) -> nn.Module:
    """nnU-Net's ResEnc M."""
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    return ResidualEncoderUNet(
        1, 6, NNUNET_WIDTHS, nn.Conv3d, 3, (1, 2, 2, 2, 2, 2), (1, 3, 4, 6, 6, 6), classes, 1, conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )  # fmt: skip


def segresnet(classes: int) -> nn.Module:
    """MONAI's SegResNet as it comes: 8 filters, group norm."""
    from monai.networks.nets import SegResNet

    return SegResNet(3, 8, 1, classes, blocks_down=(1, 2, 2, 4))


def dynunet(classes: int) -> nn.Module:
    """MONAI's reading of nnU-Net's standard network."""
    from monai.networks.nets import DynUNet

    return DynUNet(3, 1, classes, [3] * 6, [1, 2, 2, 2, 2, 2], [2] * 5, filters=NNUNET_WIDTHS)


def basic_unet(classes: int) -> nn.Module:
    """MONAI's BasicUNet as it comes."""
    from monai.networks.nets import BasicUNet

    return BasicUNet(3, 1, classes)
