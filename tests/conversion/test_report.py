"""What conversion says that it took over, and left."""

import pytest
import torch
from convertible import NETWORKS, make, plain
from torch import nn

import effseg


@pytest.mark.parametrize("name", NETWORKS)
def test_every_norm_of_known_networks_is_taken(name):
    network, _ = make(name)
    report = effseg.convert(network).conversion_report
    norms = {
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.InstanceNorm3d | nn.BatchNorm3d | nn.GroupNorm)
    }
    assert {module.name for module in report.taken} <= norms
    # nnU-Net's modules go by two names, and MONAI's DynUNet has blocks that it does not use.
    assert len(report.taken) == sum(
        isinstance(m, nn.modules.batchnorm._NormBase | nn.GroupNorm) for m in used(network)
    )
    assert report.bytes_saved > 0
    assert report.problem is None


def used(network):
    """Modules that a forward pass calls."""
    seen, handles = set(), []
    for module in network.modules():
        handles.append(module.register_forward_hook(lambda module, _args, _out: seen.add(module)))
    network(torch.zeros(2, 1, 32, 32, 32, dtype=next(network.parameters()).dtype))
    for handle in handles:
        handle.remove()
    return seen


def test_what_is_left_is_named_with_the_reason():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.LeakyReLU())
            self.dilated = nn.Conv3d(4, 4, 3, padding=2, dilation=2)
            self.activation = nn.PReLU()
            self.drop = nn.Dropout3d(0.5)
            self.up = nn.ConvTranspose3d(4, 4, 3, 2, 1, 1)

        def forward(self, x):
            return self.up(self.drop(self.activation(self.dilated(self.body(x))))).tanh()

    report = effseg.convert(Odd()).conversion_report
    left = {module.name: " ".join(module.left) for module in report.left}
    assert set(left) == {"dilated", "activation", "drop", "up", ""}
    assert "conv3d in Conv3d(4, 4" in left["dilated"]
    assert "not of a kind that is taken over" in left["dilated"]
    assert "prelu" in left["activation"]
    assert "not known" in left["activation"]
    assert "dropout3d" in left["drop"]
    assert "conv_transpose3d" in left["up"]
    assert "tanh" in left[""]
    taken = {module.name: module.taken for module in report.taken}
    assert taken == {"body.1": ("normalisation after convolution",)}
    text = str(report)
    assert text.startswith("Odd on 1x1x64x64x64: 32 bytes per voxel less are kept (float32)")
    assert "dilated (Conv3d): left: conv3d in Conv3d(4, 4" in text


def test_the_shape_may_be_given():
    report = effseg.convert(plain(), shape=(1, 1, 8, 12, 16)).conversion_report
    assert report.shape == (1, 1, 8, 12, 16)


def test_saved_bytes_are_those_of_norms_and_copies():
    """4 bytes for each element of: two normalised tensors of 4 channels on each side at full resolution, the
    concatenation and what the transposed convolution made."""
    report = effseg.convert(plain(), shape=(1, 1, 16, 16, 16)).conversion_report
    full = 4 * (2 * 4 + 2 * 4 + 8 + 4)
    half = 4 * (2 * 8 + 2 * 8 + 16 + 8) / 8
    quarter = 4 * 2 * 12 / 64
    assert report.bytes_saved == pytest.approx(full + half + quarter)
