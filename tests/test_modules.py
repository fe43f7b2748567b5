"""Building blocks against the chains of torch modules that they replace."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_exact
from torch import nn
from torch.nn.utils import parametrizations, prune

from effseg import ConvNormAct3d, ResidualBlock3d
from effseg.errors import InputError
from effseg.operators.normalisation import make_norm, normalisation

NORMS = ["instance", "batch", "group"]


def chain(unit: ConvNormAct3d) -> nn.Sequential:
    return nn.Sequential(
        copy.deepcopy(unit.conv), copy.deepcopy(unit.norm), nn.LeakyReLU(unit.negative_slope)
    )


def randomise(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"kernel_size": (1, 3, 3), "stride": (1, 2, 2)},
        {"kernel_size": 1, "bias": True},
        {"negative_slope": 0.0},
        {"negative_slope": 1.0, "bias": True},
        {"kernel_size": 5},
    ],
    ids=str,
)
def test_unit_is_a_drop_in(norm, options):
    torch.manual_seed(0)
    unit = randomise(ConvNormAct3d(3, 8, norm=norm, **options)).double()
    stock = chain(unit)
    x = torch.randn(2, 3, 9, 6, 7, dtype=torch.float64, requires_grad=True)
    for train in (True, False):
        unit.train(train), stock.train(train)
        got, expected = unit(x), stock(x)
        assert_exact(got, expected)
        grad = torch.randn_like(expected)
        grads = [
            torch.autograd.grad(y, [x, *m.parameters()], grad) for y, m in ((got, unit), (expected, stock))
        ]
        for a, b in zip(*grads, strict=True):
            # a bias before a normalisation over its own channel has gradient 0, up to rounding
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(unit.norm.buffers(), stock[1].buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_of_instance_and_batch_norm(momentum):
    torch.manual_seed(0)
    y = torch.randn(3, 4, 5, 6, 7, dtype=torch.float64) * 2 + 1
    for ours in (
        nn.BatchNorm3d(4, momentum=momentum, dtype=torch.float64),
        nn.InstanceNorm3d(4, momentum=momentum or 0.2, track_running_stats=True, dtype=torch.float64),
    ):
        stock = copy.deepcopy(ours)
        for _ in range(3):
            stock(y)
            var, mean = torch.var_mean(y, (2, 3, 4), correction=0)
            normalisation(ours, mean, var, y[0, 0].numel())
        for a, b in zip(ours.buffers(), stock.buffers(), strict=True):
            assert torch.allclose(a, b, rtol=1e-12)
        ours.eval()
        terms = normalisation(ours, mean, var, y[0, 0].numel())
        got = (y - terms.mean[..., None, None, None]) * terms.scale[..., None, None, None]
        assert_exact(got, stock.eval()(y))


@pytest.mark.parametrize(
    ("norm", "samples", "refused"),
    [
        (nn.BatchNorm3d(4), 1, True),
        (nn.BatchNorm3d(4, track_running_stats=False).eval(), 1, True),  # has no others
        (nn.InstanceNorm3d(4, track_running_stats=True), 2, True),
        (nn.BatchNorm3d(4), 2, False),
        (nn.BatchNorm3d(4).eval(), 1, False),
        (nn.InstanceNorm3d(4), 1, False),
        (nn.GroupNorm(2, 4), 1, False),
    ],
    ids=str,
)
def test_statistics_of_one_voxel_are_refused(norm, samples, refused):
    """Of a variance of 0, which evaluation would divide by; torch refuses those, and instance norm's."""
    before = copy.deepcopy(norm.state_dict())
    mean, var = torch.randn(samples, 4), torch.zeros(samples, 4)
    if not refused:
        normalisation(norm, mean, var, 1)
        return
    with pytest.raises(ValueError, match="more than 1"):
        norm(mean[..., None, None, None])
    with pytest.raises(InputError, match="norm: expected more than one voxel per channel"):
        normalisation(norm, mean, var, 1)
    for name, value in norm.state_dict().items():
        assert name == "num_batches_tracked" or torch.equal(value, before[name])


@pytest.mark.parametrize("norm", NORMS)
def test_residual_block(norm):
    torch.manual_seed(0)
    block = randomise(ResidualBlock3d(8, norm)).double()
    x = torch.randn(2, 8, 5, 6, 7, dtype=torch.float64, requires_grad=True)
    first, last = chain(block.unit), chain(block.last)[:2]
    got, expected = block(x), F.leaky_relu(x + last(first(x)), 0.01)
    assert_exact(got, expected)
    grad = torch.randn_like(expected)
    a, b = (torch.autograd.grad(y, x, grad)[0] for y in (got, expected))
    assert_exact(a, b)


def test_unit_is_an_ordinary_module():
    unit = ConvNormAct3d(2, 8)
    assert set(unit.state_dict()) == {"conv.weight", "norm.weight", "norm.bias"}
    for clone in (copy.deepcopy(unit), pickle.loads(pickle.dumps(unit))):
        x = torch.randn(1, 2, 8, 8, 8)
        assert torch.equal(clone(x), unit(x))


def test_autocast_sets_the_compute_dtype():
    unit, x = ConvNormAct3d(2, 8), torch.randn(1, 2, 16, 16, 16)
    assert unit(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        y = unit(x)
        assert y.dtype == torch.bfloat16
        assert unit.double()(x.double()).dtype == torch.float64
    unit.float()
    with torch.autocast("cpu", torch.bfloat16):
        unit(x).float().square().sum().backward()
    assert unit.conv.weight.grad.dtype == torch.float32


def test_bad_arguments_are_named():
    for call, message in [
        (lambda: ConvNormAct3d(1, 8, kernel_size=2), "kernel_size: expected odd"),
        (lambda: ConvNormAct3d(1, 8, norm="layer"), "norm: expected one of"),
        (lambda: ConvNormAct3d(1, 8, negative_slope=-1), "negative_slope: expected 0 or more"),
        (lambda: ConvNormAct3d(1, 8)(torch.randn(1, 2, 4, 4, 4)), "weight: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert make_norm("group", 12).num_groups == 1


def test_what_would_be_left_out_silently_is_refused():
    x = torch.randn(2, 1, 4, 4, 4)
    for norm in (nn.Identity(), nn.SyncBatchNorm(8)):
        unit = ConvNormAct3d(1, 8)
        unit.norm = norm
        with pytest.raises(TypeError, match="norm: expected InstanceNorm3d"):
            unit(x)
    unit = ConvNormAct3d(1, 8)
    prune.l1_unstructured(unit.conv, "weight", 0.5)
    with pytest.raises(ValueError, match="conv: expected no hooks"):
        unit(x)
    unit = ConvNormAct3d(1, 8)
    unit.norm.register_full_backward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="norm: expected no hooks"):
        unit(x)
    unit = ConvNormAct3d(1, 8)
    unit.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    assert torch.equal(unit(x), 2 * unit.eval().forward(x))
    block = ResidualBlock3d(8)
    block.unit.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="unit: expected no hooks"):
        block(torch.randn(2, 8, 4, 4, 4))
    unit = ConvNormAct3d(1, 8)
    parametrizations.weight_norm(unit.conv)
    unit(x).square().sum().backward()
    assert unit.conv.parametrizations.weight.original0.grad is not None
