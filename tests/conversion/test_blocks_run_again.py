"""Blocks that run again in backward give the original's numbers, whatever is done to them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import effseg

AGAIN = pytest.mark.parametrize("memory", ["block", "stream"])


class Pair(nn.Module):
    """Two convolutions with norm and activation: a block."""

    def __init__(self, channels, wrapped=lambda layer: layer, act=F.leaky_relu):
        super().__init__()
        self.first, self.second = (wrapped(nn.Conv3d(c, 8, 3, padding=1)) for c in (channels, 8))
        self.norm, self.last_norm = nn.BatchNorm3d(8), nn.InstanceNorm3d(8, affine=True)
        self.act = act

    def forward(self, x):
        return self.act(self.last_norm(self.second(self.act(self.norm(self.first(x))))))


class Network(nn.Module):
    """Two blocks, a layer and a head."""

    def __init__(self, block=Pair, **options):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.middle = (block(c, **options) for c in (1, 8))
        self.last, self.norm, self.head = (
            nn.Conv3d(8, 8, 3, padding=1),
            nn.InstanceNorm3d(8),
            nn.Conv3d(8, 3, 1),
        )
        for parameter in self.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, 1, 0.2)

    def forward(self, image):
        return self.head(F.leaky_relu(self.norm(self.last(self.middle(self.enter(image))))))


def both(network, memory):
    """A converted copy, and the network itself."""
    network.double()
    return effseg.convert(copy.deepcopy(network), memory=memory, leave_alone=False), network


def step(network, call=None, between=None):
    """Outputs, gradients and buffers of a step with two images; between: done before backward."""
    torch.manual_seed(1)
    images = torch.randn(2, 1, 1, 4, 6, 5, dtype=torch.float64)
    network.zero_grad()
    outputs = [call(network, image) if call else network(image) for image in images]
    loss = sum((output.cos() * (i + 1)).sum() for i, output in enumerate(outputs))
    if between:
        between(network)
    loss.backward()
    grads = {name: p.grad for name, p in network.named_parameters()}
    return [o.detach() for o in outputs], grads, {name: b.clone() for name, b in network.named_buffers()}


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@AGAIN
def test_a_parametrised_weight_is_computed_once_in_forward(memory):
    """Each time changes the vectors that a spectral norm iterates."""
    converted, network = both(Network(wrapped=spectral_norm), memory)
    for _ in range(2):
        assert_same(step(converted), step(network))


class Scaled(Pair):
    """Returns features, coarser ones, a number of voxels and a mean, and the features once more."""

    def forward(self, x):
        y = super().forward(x)
        return {"all": (y, F.max_pool3d(y, 2), y.shape[2:].numel()), "mean": y.mean(), "again": y}


class OfScaled(Network):
    def forward(self, image):
        entered = self.enter(image)
        y, coarse, voxels = self.middle(entered["again"])["all"]
        assert entered["again"] is entered["all"][0]
        x = y + F.interpolate(coarse, y.shape[2:]) * entered["mean"] / voxels
        return self.head(F.leaky_relu(self.norm(self.last(x))))


@AGAIN
def test_what_leaves_a_block_may_be_several_tensors(memory):
    converted, network = both(OfScaled(Scaled), memory)
    assert_same(step(converted), step(network))


@AGAIN
def test_an_operator_that_fills_what_it_saves_when_it_runs(memory):
    """The noise of a randomised ReLU, the last that a block saves."""
    converted, network = both(Network(act=nn.RReLU(0.1, 0.4)), memory)
    assert_same(step(converted), step(network))
