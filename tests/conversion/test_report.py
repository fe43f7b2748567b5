"""What conversion says that it took over, and left."""

import pytest
import torch
from convertible import A_FEW, make, plain
from torch import nn

import effseg


@pytest.mark.parametrize("name", A_FEW)
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
    assert "not of a kind that is taken over" in left["activation"]
    assert "dropout3d" in left["drop"]
    assert "conv_transpose3d" in left["up"]
    assert "tanh" in left[""]
    assert "not known" in left[""]
    taken = {module.name: module.taken for module in report.taken}
    assert taken == {"body.1": ("normalisation after convolution",)}
    text = str(report)
    assert text.startswith("Odd on 1x1x64x64x64: a step keeps 192 of 208 bytes per voxel for backward")
    assert "dilated (Conv3d): left: conv3d in Conv3d(4, 4" in text


def test_the_shape_may_be_given():
    report = effseg.convert(plain(), shape=(1, 1, 8, 12, 16)).conversion_report
    assert report.shape == (1, 1, 8, 12, 16)


def test_saved_bytes_are_those_that_a_step_no_longer_keeps():
    """4 bytes for each element of: two activated tensors of 4 channels on each side at full resolution, and
    the concatenation; and of what the loss keeps of logits (softmax and its logarithm, a byte for each of
    the one-hot labels)."""
    report = effseg.convert(plain(), shape=(1, 1, 16, 16, 16)).conversion_report
    full = 4 * (2 * 4 + 2 * 4 + 8)
    half = 4 * (2 * 8 + 2 * 8 + 16) / 8
    quarter = 4 * 2 * 12 / 64
    loss = (4 + 4 + 1) * 3
    assert report.bytes_saved == pytest.approx(full + half + quarter + loss, abs=0.5)
    assert report.peak_saved > 0
    assert f"a step keeps {report.after.kept:.0f} of {report.before.kept:.0f} bytes" in str(report)


def test_the_first_convolution_is_the_one_that_runs_first():
    class DecoderFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv3d(8, 3, 1)
            self.body = nn.Sequential(nn.Conv3d(2, 8, 3, padding=1), nn.InstanceNorm3d(8), nn.ReLU())

        def forward(self, x):
            return self.head(self.body(x))

    report = effseg.convert(DecoderFirst()).conversion_report
    assert report.shape == (1, 2, 64, 64, 64)
    assert report.problem is None


def test_converting_prints_nothing(capfd):
    """A Linear of another size than those that are tried."""
    network = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 512, 3)
    )
    assert effseg.convert(network).conversion_report.problem is not None
    assert capfd.readouterr() == ("", "")
