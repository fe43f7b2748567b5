"""Blocks that run again in backward give the original's numbers, whatever is done to them."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

import effseg

AGAIN = pytest.mark.parametrize("memory", ["block", "stream"])


class Pair(nn.Module):
    """Two convolutions with norm and activation: a block."""

    def __init__(self, channels, wrapped=lambda layer: layer, act=None):
        super().__init__()
        self.first, self.second = (wrapped(nn.Conv3d(c, 8, 3, padding=1)) for c in (channels, 8))
        self.norm, self.last_norm = nn.BatchNorm3d(8), nn.InstanceNorm3d(8, affine=True)
        self.act = act or nn.LeakyReLU(0.1)

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


@AGAIN
def test_what_leaves_a_block_may_be_an_ordinary_tensor(memory):
    """A hook's result."""
    found = both(Network(), memory)
    for each in found:
        each.middle.act.register_forward_hook(lambda module, args, output: output * 1.5)
    assert_same(*map(step, found))


@AGAIN
@pytest.mark.parametrize("where", ["first", "norm", "second", "last_norm"])
def test_hooks_of_layers_inside(memory, where):
    """They are there for the forward pass alone."""
    found = both(Network(), memory)
    for each in found:
        layer = each.middle.get_submodule(where)
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        layer.register_forward_hook(lambda module, args, output: output * 1.5)
    assert_same(*map(step, found))


class Conditioned(Pair):
    """Reads what the network sets, and counts and remembers what it does."""

    by, calls = 3.0, 0

    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("mean", torch.zeros(()))
        self.seen = []

    def forward(self, x):
        self.calls += 1
        self.seen.append(x.shape)
        y = super().forward(x * self.by * self.calls)
        self.mean = self.mean * 0.9 + y.detach().mean()
        return y + self.mean


def conditioned(network, image):
    for block in (network.enter, network.middle):
        block.by = image.mean() * block.by
    return network(image)


@AGAIN
def test_attributes_are_those_of_the_forward_pass(memory):
    """Two of them before one backward; afterwards all is as the second one left it."""
    converted, network = both(Network(Conditioned), memory)
    assert_same(step(converted, conditioned), step(network, conditioned))
    for one, other in ((converted.enter, network.enter), (converted.middle, network.middle)):
        assert (one.calls, one.seen) == (other.calls, other.seen)
        assert_same(one.by, other.by)


def evaluated(network):
    network.eval()


def frozen(network):
    network.requires_grad_(False)


def forgotten(network):
    network.enter.by = network.middle.by = network.enter.seen = network.middle.seen = None


def refused(module, args):
    raise AssertionError("a hook that came later")


def hooked(network):
    network.middle.second.register_forward_pre_hook(refused)


@AGAIN
@pytest.mark.parametrize("change", [evaluated, frozen, forgotten, hooked])
def test_a_change_between_forward_and_backward(memory, change):
    converted, network = both(Network(Conditioned), memory)
    assert_same(step(converted, conditioned, change), step(network, conditioned, change))
    assert [m.training for m in converted.modules()] == [m.training for m in network.modules()]
    assert [p.requires_grad for p in converted.parameters()] == [
        p.requires_grad for p in network.parameters()
    ]


@AGAIN
def test_parameters_of_a_functional_call(memory):
    found = []
    for each in both(Network(), memory):
        others = {n: (p.detach() * 1.5).requires_grad_() for n, p in each.named_parameters()}
        outputs, *_ = step(
            each, lambda network, image, others=others: functional_call(network, others, (image,))
        )
        found.append((outputs, {name: p.grad for name, p in others.items()}))
    assert_same(*found)


def test_a_second_pass_that_fails_leaves_the_block_as_it_is():
    converted, _ = both(Network(), "block")
    calls = []

    def fail(module, args):
        calls.append(module)
        if len(calls) == 2:
            raise ArithmeticError

    converted.middle.second.register_forward_pre_hook(fail)
    output = converted(torch.randn(1, 1, 4, 6, 5, dtype=torch.float64))
    converted.middle.eval().requires_grad_(False)
    before = {module: vars(module) for module in converted.middle.modules()}
    with pytest.raises(ArithmeticError):
        output.sum().backward()
    assert all(vars(module) is before[module] for module in before)
    assert not any(p.requires_grad for p in converted.middle.parameters())


class Remembering(Pair):
    """Its output and, without a look at it, the one before; adds the latest, if told to."""

    last, other, adds = None, [None], False

    def forward(self, x):
        self.other = [self.last]
        y = super().forward(x)
        self.last = y + self.last.detach() if self.adds and self.last is not None else y
        return self.last


@AGAIN
@pytest.mark.parametrize("adds", [False, True])
def test_what_a_block_remembered_of_earlier_steps_is_let_go(memory, adds):
    """No step's graph holds that of the one before."""
    network = Network(Remembering)
    network.middle.adds = adds
    found = both(network, memory)
    image = torch.randn(1, 1, 4, 6, 5, dtype=torch.float64)
    alive = []
    for _ in range(4):
        for each in found:
            each.zero_grad()
            each(image).cos().sum().backward()
        alive.append(weakref.ref(found[0].middle.last))
        gradients = [[p.grad for p in each.parameters()] for each in found]
        assert_same(*gradients)
    gc.collect()
    assert [each() is not None for each in alive] == [False, False, True, True]
