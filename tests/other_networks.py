"""Small networks of more families than `convertible` has: MONAI's, and blocks of others in own words."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def monai(name, *arguments, **options):
    return lambda: getattr(pytest.importorskip("monai.networks.nets"), name)(*arguments, **options)


class MedNeXtLike(nn.Module):
    """Depthwise 3x3x3 convolution, group norm, widened 1x1x1, GELU, narrowed 1x1x1, residual; checkpointed
    (Roy et al., MICCAI 2023)."""

    def __init__(self, outside: bool = True) -> None:
        super().__init__()
        self.outside = outside
        self.stem = nn.Conv3d(1, 8, 1)
        self.blocks = nn.ModuleList(_MedNeXtBlock(8) for _ in range(2))
        self.down = nn.Conv3d(8, 16, 3, stride=2, padding=1)
        self.inner = _MedNeXtBlock(16)
        self.up = nn.ConvTranspose3d(16, 8, 3, stride=2, padding=1, output_padding=1)
        self.out = nn.Conv3d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.outside) if x.requires_grad else block(x)
        return self.out(x + self.up(self.inner(self.down(x))))


class _MedNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, width, 3, padding=1, groups=width)
        self.norm = nn.GroupNorm(width, width)
        self.wide, self.narrow = nn.Conv3d(width, 2 * width, 1), nn.Conv3d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.gelu(self.wide(self.norm(self.conv(x)))))


class STUNetLike(nn.Module):
    """Residual blocks with a 1x1x1 skip convolution, and nearest interpolation + 1x1x1 to go up
    (Huang et al., 2023)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = _STUBlock(1, 8, 1)
        self.second = nn.Sequential(_STUBlock(8, 12, 2), _STUBlock(12, 12, 1))
        self.third = _STUBlock(12, 16, 2)
        self.up = nn.ModuleList([nn.Conv3d(16, 12, 1), nn.Conv3d(12, 8, 1)])
        self.join = nn.ModuleList([_STUBlock(24, 12, 1), _STUBlock(16, 8, 1)])
        self.heads = nn.ModuleList([nn.Conv3d(12, 3, 1), nn.Conv3d(8, 3, 1)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        skips = [self.first(x)]
        skips.append(self.second(skips[-1]))
        x, outputs = self.third(skips[-1]), []
        for up, join, head, skip in zip(self.up, self.join, self.heads, reversed(skips), strict=True):
            x = up(F.interpolate(x, scale_factor=2, mode="nearest"))
            x = join(torch.cat((x, skip), dim=1))
            outputs.append(head(x))
        return tuple(outputs[::-1])


class _STUBlock(nn.Module):
    def __init__(self, narrow: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(narrow, width, 3, stride, 1)
        self.norm1, self.act1 = nn.InstanceNorm3d(width, affine=True), nn.LeakyReLU(inplace=True)
        self.conv2 = nn.Conv3d(width, width, 3, padding=1)
        self.norm2, self.act2 = nn.InstanceNorm3d(width, affine=True), nn.LeakyReLU(inplace=True)
        self.conv3 = nn.Conv3d(narrow, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        y += self.conv3(x)
        return self.act2(y)


class ResidualSE3DUNetLike(nn.Module):
    """Norm before convolution, ELU, squeeze-and-excitation of space and channels, summed skips
    (Wolny's pytorch-3dunet)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _GroupBlock(1, 8), _GroupBlock(8, 16)
        self.up = nn.ConvTranspose3d(16, 8, 3, stride=2, padding=1)
        self.last, self.head = _GroupBlock(8, 8), nn.Conv3d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.first(x)
        x = self.second(F.max_pool3d(skip, 2))
        return self.head(self.last(skip + self.up(x, output_size=skip.shape[2:])))


class _GroupBlock(nn.Module):
    def __init__(self, narrow: int, width: int) -> None:
        super().__init__()
        self.widen = nn.Conv3d(narrow, width, 1)
        self.norm1, self.conv1 = nn.GroupNorm(4, width), nn.Conv3d(width, width, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.GroupNorm(4, width), nn.Conv3d(width, width, 3, padding=1, bias=False)
        self.squeeze = nn.Linear(width, width // 2)
        self.excite, self.space = nn.Linear(width // 2, width), nn.Conv3d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.widen(x)
        y = F.elu(self.conv1(self.norm1(x)), inplace=True)
        y = self.conv2(self.norm2(y))
        y += x
        y = F.elu(y)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3, 4))))))
        channels = y * gate.view(*gate.shape, 1, 1, 1)
        return torch.max(channels, y * torch.sigmoid(self.space(y)))


NETWORKS = {
    "basic unet++": monai("BasicUNetPlusPlus", 3, 1, 3, features=(4, 4, 8, 8, 12, 4), deep_supervision=True),
    "segresnet ds": monai("SegResNetDS", 3, 8, 1, 3, blocks_down=(1, 1, 2), dsdepth=2),
    "segresnet vae": monai(
        "SegResNetVAE", (16, 16, 16), spatial_dims=3, init_filters=8, in_channels=1, out_channels=3,
        blocks_down=(1, 2, 2), blocks_up=(1, 1), vae_estimate_std=False,
    ),
    "unet, prelu": monai("UNet", 3, 1, 3, (4, 8, 12), (2, 2), num_res_units=2),
    "vnet": monai("VNet", 3, 1, 3, dropout_prob_down=0.0, dropout_prob_up=(0.0, 0.0)),
    "attention unet": monai("AttentionUnet", 3, 1, 3, (4, 8, 12), (2, 2)),
    "unetr": monai("UNETR", 1, 3, (16, 16, 16), feature_size=4, hidden_size=24, mlp_dim=32, num_heads=2),
    "swin unetr": monai(
        "SwinUNETR", 1, 3, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), spatial_dims=3
    ),
    "mednext": MedNeXtLike,
    "mednext, not reentrant": lambda: MedNeXtLike(outside=False),
    "stu-net": STUNetLike,
    "residual se 3d unet": ResidualSE3DUNetLike,
}  # fmt: skip
SIZES = {
    "basic unet++": (1, 1, 32, 16, 16),
    "segresnet vae": (1, 1, 16, 16, 16),
    "swin unetr": (1, 1, 32, 32, 64),
    "vnet": (1, 1, 32, 32, 16),
    "unetr": (1, 1, 16, 16, 16),
}


def make(name, dtype=torch.float64):
    """The network with norms that do something, and an image that it takes."""
    torch.manual_seed(0)
    network = NETWORKS[name]().to(dtype)
    for parameter in network.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1, 0.2)
    return network, torch.randn(SIZES.get(name, (1, 1, 16, 16, 16)), dtype=dtype)
