"""Small networks of every family that `effseg.convert` is made for."""

import pytest
import torch
from torch import nn


def plain(norm=nn.InstanceNorm3d, nonlin=nn.LeakyReLU, deep=False, dropout=0.0, **options):
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    return unet.PlainConvUNet(
        1, 3, (4, 8, 12), nn.Conv3d, 3, (1, 2, 2), 2, 3, 2, conv_bias=True, deep_supervision=deep,
        **dna(norm, nonlin, dropout), **options,
    )  # fmt: skip


def small():
    """Two levels of one convolution each and a head."""
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    return unet.PlainConvUNet(
        1, 2, (4, 8), nn.Conv3d, 3, (1, 2), 1, 3, 1, conv_bias=True,
        **dna(nn.InstanceNorm3d, nn.LeakyReLU, 0.0),
    )  # fmt: skip


def residual(norm=nn.InstanceNorm3d, nonlin=nn.LeakyReLU, deep=False, dropout=0.0):
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    return unet.ResidualEncoderUNet(
        1, 3, (4, 8, 12), nn.Conv3d, 3, (1, (1, 2, 2), 2), (1, 2, 4), 3, 1, conv_bias=True,
        deep_supervision=deep, **dna(norm, nonlin, dropout),
    )  # fmt: skip


def dna(norm, nonlin, dropout):
    group = norm is nn.GroupNorm
    return {
        "norm_op": (lambda channels: nn.GroupNorm(2, channels)) if group else norm,
        "norm_op_kwargs": {} if group else {"eps": 1e-5, "affine": True},
        "nonlin": nonlin,
        "nonlin_kwargs": {"inplace": True},
        "dropout_op": nn.Dropout3d,
        "dropout_op_kwargs": {"p": dropout, "inplace": True},
    }


def basic(norm=("instance", {"affine": True}), **options):
    nets = pytest.importorskip("monai.networks.nets")
    return nets.BasicUNet(3, 1, 3, (4, 4, 8, 8, 12, 4), norm=norm, **options)


def dynunet(norm=("instance", {"affine": True}), **options):
    nets = pytest.importorskip("monai.networks.nets")
    return nets.DynUNet(
        3, 1, 3, [3, (1, 3, 3), 3], [1, (1, 2, 2), 2], [(1, 2, 2), 2], (4, 8, 12), norm_name=norm, **options
    )


def segresnet(**options):
    nets = pytest.importorskip("monai.networks.nets")
    return nets.SegResNet(3, 8, 1, 3, blocks_down=(1, 2, 2), blocks_up=(1, 1), **options)


NETWORKS = {
    "plain": plain,
    "plain deep": lambda: plain(deep=True),
    "plain batch": lambda: plain(nn.BatchNorm3d, nn.ReLU),
    "plain group": lambda: plain(nn.GroupNorm),
    "residual": residual,
    "residual deep batch": lambda: residual(nn.BatchNorm3d, deep=True),
    "residual group": lambda: residual(nn.GroupNorm, nn.ReLU),
    "basic": basic,
    "basic batch": lambda: basic(("batch", {"momentum": 0.2})),
    "basic group, interpolated": lambda: basic(("group", {"num_groups": 2}), upsample="nontrainable"),
    "dynunet": dynunet,
    "dynunet residual, deep": lambda: dynunet(res_block=True, deep_supervision=True),
    "dynunet batch": lambda: dynunet("batch", trans_bias=True),
    "segresnet": segresnet,
    "segresnet deconv, instance": lambda: segresnet(
        upsample_mode="deconv", norm=("instance", {"affine": True})
    ),
    "segresnet batch, dropout 0": lambda: segresnet(norm="batch", dropout_prob=0.0),
}
FEW = ("plain deep", "residual", "basic batch", "dynunet residual, deep", "segresnet")
A_FEW = [pytest.param(n, marks=[pytest.mark.slow] * (n not in FEW)) for n in NETWORKS]
"""Those of each family by default, all of them in the slow tests."""
SIZE = (2, 1, 16, 20, 24)
SIZES = {name: (2, 1, 16, 32, 16) for name in NETWORKS if name.startswith("basic")}


def make(name, dtype=torch.float64):
    """The network with norms that do something, and an image that it takes."""
    torch.manual_seed(0)
    network = (small if name == "small" else NETWORKS[name])().to(dtype)
    for parameter in network.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1, 0.2)
    return network, torch.randn(SIZES.get(name, SIZE), dtype=dtype)


def listed(outputs):
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


def step(network, image):
    """Outputs, gradients of image and parameters, buffers."""
    network.zero_grad()
    image = image.clone().requires_grad_()
    outputs = listed(network(image))
    random = torch.Generator().manual_seed(1)
    loss = 0
    for output in outputs:
        # The same numbers in any type: drawn in float64 they would be others.
        weights = torch.randn(output.shape, generator=random, dtype=torch.float32).to(output.dtype)
        loss = loss + (output * weights).sum()
    loss.backward()
    grads = [image.grad, *(p.grad for p in network.parameters())]
    return [o.detach() for o in outputs], grads, list(network.buffers())


def assert_alike(found, expected, tolerance):
    """Relative to the norm of a tensor, and of gradients to all of them: that of a bias under instance
    normalisation is 0 but for rounding."""
    whole = torch.stack([g.norm() for g in expected[1] if g is not None]).norm()
    for ours, theirs, floor in zip(found, expected, (0.0, whole, 0.0), strict=True):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b.is_floating_point():
                assert (a - b).norm() <= tolerance * max(b.norm(), 1e-3 * floor, 1e-30)
            elif a is not None:
                assert torch.equal(a, b)
