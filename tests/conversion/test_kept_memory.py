"""Tensors that change in place after operators have used them which, in torch, keep nothing of them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import effseg
from effseg.conversion.convert import as_converted

USES = {
    "concatenation": lambda net, a: net.narrow(torch.cat([a, a], 1)),
    "concatenation of a layer": lambda net, a: net.narrow(torch.cat([net.layer(net.door), a], 1)),
    "sum after a norm": lambda net, a: net.after(net.layer(net.door) + a),
    "sum after a norm, then an activation": lambda net, a: net.after(F.relu(a + net.layer(net.door))),
    "sum after a convolution": lambda net, a: net.after(net.layer[0](net.door) + a),
    "sum of a layer": lambda net, a: net.after(F.elu(net.layer(net.door)) + a),
    "sum after upsampling": lambda net, a: net.after(net.upsampled(net.door) + a),
    "nothing padded": lambda net, a: net.after(F.pad(a, [0] * 6)),
}
LOOKS = {
    "nothing": lambda net, a: None,
    "checkpoint": lambda net, a: checkpoint(net.other, a, use_reentrant=False),
    "view": lambda net, a: a[:, :1],
    "flattened": lambda net, a: a.flatten(2),
    "hook": lambda net, a: net.hooked(a),
    "function": lambda net, a: Same.apply(a),
    "numpy": lambda net, a: a.detach().numpy(),
}


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Network(nn.Module):
    def __init__(self, use, look, looks_first):
        super().__init__()
        self.use, self.look, self.looks_first = use, look, looks_first
        self.first, self.second = (nn.Conv3d(1, 4, 3, padding=1) for _ in range(2))
        self.layer = nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.InstanceNorm3d(4))
        self.narrow, self.after, self.other = nn.Conv3d(8, 4, 1), nn.Conv3d(4, 4, 1), nn.Conv3d(4, 4, 1)
        self.coarse, self.hooked = nn.Conv3d(4, 4, 1), nn.Dropout3d(0.0)
        self.hooked.register_forward_pre_hook(lambda module, args: None)

    def upsampled(self, x):
        return F.interpolate(
            self.coarse(F.max_pool3d(x, 2)), scale_factor=2, mode="trilinear", align_corners=False
        )

    def forward(self, image):
        self.door, a = self.second(image), self.first(image)
        if self.looks_first:
            seen = LOOKS[self.look](self, a)
        used = USES[self.use](self, a)
        if not self.looks_first:
            seen = LOOKS[self.look](self, a)
        a.mul_(2)
        self.door = None
        looked_at = torch.tensor(seen).flatten()[0] if self.look == "numpy" else 0
        if self.look in ("view", "flattened"):
            looked_at = seen.square().sum()
        return used.square() + a * 3 + looked_at


@pytest.mark.parametrize("looks_first", [False, True], ids=["used first", "looked at first"])
@pytest.mark.parametrize("look", ["nothing", "checkpoint", "view"])
@pytest.mark.parametrize("use", USES)
def test_a_change_in_place_after_it(use, look, looks_first):
    check(use, look, looks_first, ["raw"])


@pytest.mark.slow
@pytest.mark.parametrize("looks_first", [False, True], ids=["used first", "looked at first"])
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("use", USES)
def test_a_change_in_place_in_every_mode(use, look, looks_first):
    check(use, look, looks_first, ["raw", "block", "stream"])


def check(use, look, looks_first, modes):
    torch.manual_seed(0)
    plain = Network(use, look, looks_first).double()
    image = torch.randn(1, 1, 4, 4, 4, dtype=torch.float64)
    network = effseg.convert(copy.deepcopy(plain), strict=False, leave_alone=False, shape=image.shape)
    for mode in modes:
        both = [copy.deepcopy(plain), as_converted(copy.deepcopy(network), mode)]
        expected, found = (each(image) for each in both)
        torch.testing.assert_close(found, expected)
        for values in (expected, found):
            values.cos().sum().backward()
        for (name, a), b in zip(both[1].named_parameters(), both[0].parameters(), strict=True):
            if b.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9, msg=name)
