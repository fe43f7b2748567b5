"""Normalisation with activation, its gradient, and the gradient through statistics."""

import faults
import pytest
import torch
import torch.nn.functional as F
from convolution_cases import activated, norm, norm_size
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_rounded, slack, slack_of_sum
from torch._subclasses.fake_tensor import FakeTensorMode

from effseg.kernels.config import Config
from effseg.kernels.launch import NormAct, empty
from effseg.kernels.norm_act import fold, norm_act, norm_act_backward

NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tiles that end inside a sample and inside the channels.
CONFIG = Config("tile", block_w=32, block_n=16, splits=6)

# samples, channels, size, slope
CASES = [
    (torch.float32, 1, 1, (1, 1, 1), 0.01),
    (torch.float32, 3, 5, (2, 7, 9), 0.0),
    (torch.float32, 1, 33, (1, 9, 7), 1.5),
    (torch.bfloat16, 1, 16, (2, 7, 11), 0.01),
    (torch.bfloat16, 2, 48, (3, 1, 7), 1.0),
    (torch.float16, 2, 17, (2, 2, 9), 0.2),
]


def values(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(shape, generator=generator).to(device, dtype)
    return t.contiguous(memory_format=torch.channels_last_3d)


def make_terms(n, c, device, slope):
    mean, scale, beta = torch.randn(3, n, c, generator=torch.Generator().manual_seed(1)).to(device)
    return NormAct(mean, scale, beta, slope)


def nans(like):
    return torch.full_like(like, NAN, memory_format=torch.preserve_format)


def wide(t):
    return None if t is None else t.cpu().double()


def on_cpu(terms):
    return NormAct(*(t.cpu() for t in terms[:3]), terms.slope)


def assert_forward(out, y, terms, addend=None):
    y, addend, terms = wide(y), wide(addend), on_cpu(terms)
    z, size = norm(y, terms), norm_size(y, terms)
    if addend is not None:
        z, size = z + addend, size + addend.abs() * max(1.0, terms.slope)
    assert_rounded(out, F.leaky_relu(z, terms.slope), slack(size), "out")


def assert_backward(found, grad, y, terms, activated=None):
    """found: dz, dy and the sums; the sign of z is open near 0 where no activated value tells it."""
    grad, y, sign, terms = wide(grad), wide(y), wide(activated), on_cpu(terms)
    mean, scale = (t.double()[..., None, None, None] for t in terms[:2])
    near = -1.0
    if sign is None:
        sign, near = norm(y, terms), slack(norm_size(y, terms))
    dz = torch.where(sign > 0, grad, grad * terms.slope)
    allowed = slack(dz.abs()) + torch.where(sign.abs() <= near, (1 - terms.slope) * grad, 0).abs()
    centred = y - mean
    space = (2, 3, 4)
    assert_rounded(found[0], dz, allowed, "dz")
    assert_rounded(found[1], dz * scale, allowed * scale.abs(), "dy")
    parts, slacks = dz * centred, allowed * centred.abs() + slack(dz.abs() * mean.abs())
    assert_rounded(found[2], parts.sum(space), slack_of_sum(parts, slacks, space), "dscale")
    assert_rounded(found[3], dz.sum(space), slack_of_sum(dz, allowed, space), "dbeta")


@pytest.mark.parametrize("with_addend", [False, True])
@pytest.mark.parametrize(("dtype", "n", "c", "size", "slope"), CASES)
def test_forward(dtype, n, c, size, slope, with_addend, kernel_device):
    y = values((n, c, *size), dtype, kernel_device)
    addend = values(y.shape, dtype, kernel_device, seed=2) if with_addend else None
    terms = make_terms(n, c, kernel_device, slope)
    out = nans(y)
    norm_act(y, terms, out, addend, CONFIG)
    assert_forward(out, y, terms, addend)


@pytest.mark.parametrize("with_addend", [False, True])
@pytest.mark.parametrize(("dtype", "n", "c", "size", "slope"), CASES)
def test_backward(dtype, n, c, size, slope, with_addend, kernel_device):
    y, grad = (values((n, c, *size), dtype, kernel_device, seed) for seed in (0, 3))
    addend = values(y.shape, dtype, kernel_device, seed=2) if with_addend else None
    terms = make_terms(n, c, kernel_device, slope)
    a = None
    if with_addend:
        a = nans(y)
        norm_act(y, terms, a, addend, CONFIG)
    dy, dz = nans(y), nans(y)
    sums = norm_act_backward(grad, y, terms, activated=a, dy=dy, dz=dz, sums=True, config=CONFIG)
    assert_backward((dz, dy, *sums), grad, y, terms, a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fault_is_seen(dtype, kernel_device):
    y, grad = (values((1, 5, 2, 3, 7), dtype, kernel_device, seed) for seed in (0, 3))
    terms = make_terms(1, 5, kernel_device, 0.2)
    found = out, dy, dz = nans(y), nans(y), nans(y)
    norm_act(y, terms, out, None, CONFIG)
    sums = norm_act_backward(grad, y, terms, dy=dy, dz=dz, sums=True, config=CONFIG)
    for i in range(5):
        wrong = [t.clone() for t in (*found, *sums)]
        (faults.border if i < 3 else faults.one)(wrong[i])
        with pytest.raises(AssertionError, match="elements wrong"):
            assert_both(*wrong, grad, y, terms)


def assert_both(out, dy, dz, dscale, dbeta, grad, y, terms):
    assert_forward(out, y, terms)
    assert_backward((dz, dy, dscale, dbeta), grad, y, terms)


def test_backward_in_place_and_in_parts(kernel_device):
    y, grad = (values((2, 5, 2, 3, 5), torch.bfloat16, kernel_device, seed) for seed in (0, 1))
    terms = make_terms(2, 5, kernel_device, 0.01)
    dy, dz = nans(y), nans(y)
    sums = norm_act_backward(grad, y, terms, dy=dy, dz=dz, sums=True, config=CONFIG)
    only = norm_act_backward(grad, y, terms, sums=True, config=CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(sums, only, strict=True))
    only_dy = nans(y)
    assert norm_act_backward(grad, y, terms, dy=only_dy, sums=False, config=CONFIG) is None
    assert torch.equal(only_dy, dy)
    norm_act_backward(grad, y, terms, dz=grad, sums=False, config=CONFIG)
    assert torch.equal(grad, dz)


def test_zero_has_the_negative_slope(kernel_device):
    y = torch.zeros(1, 1, 1, 1, 4, device=kernel_device)
    grad, dz = torch.ones_like(y), nans(y)
    one = torch.ones(1, 1, device=kernel_device)
    norm_act_backward(grad, y, NormAct(0 * one, one, 0 * one, 0.25), dz=dz, sums=False, config=CONFIG)
    assert torch.equal(dz, torch.full_like(y, 0.25))


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize(("dtype", "n", "c"), [(torch.float32, 3, 5), (torch.bfloat16, 1, 16)])
def test_fold(dtype, n, c, with_grad, kernel_device):
    y, grad = (values((n, c, 2, 7, 3), dtype, kernel_device, seed) for seed in (0, 1))
    terms = make_terms(n, c, kernel_device, 1.0)
    out = nans(y)
    fold(grad if with_grad else None, y, *terms[:3], out, CONFIG)
    assert_forward(out, y, terms, grad if with_grad else None)


def test_any_layout_and_slabs(kernel_device):
    """Channels first, and rows of larger tensors: what is around them is not touched."""
    whole = values((2, 16, 5, 3, 7), torch.float32, kernel_device)
    y = whole[:, :, 1:4]
    terms = make_terms(2, 16, kernel_device, 0.01)
    plain, first = nans(y.contiguous(memory_format=torch.channels_last_3d)), y.contiguous()
    norm_act(first, terms, plain, first, CONFIG)
    around = torch.full_like(whole, 7.0)
    norm_act(y, terms, around[:, :, 2:5], y, CONFIG)
    assert torch.equal(around[:, :, 2:5], plain)
    assert bool((around[:, :, :2] == 7).all())

    outs = [nans(plain), nans(plain)]
    sums = [
        norm_act_backward(t, t, terms, dy=out, sums=True, config=CONFIG)
        for t, out in zip((y, first), outs, strict=True)
    ]
    assert torch.equal(*outs)
    assert all(torch.equal(a, b) for a, b in zip(*sums, strict=True))


def test_same_bits_and_no_unwritten_partials(kernel_device, monkeypatch):
    y, grad = (values((2, 33, 2, 5, 7), torch.bfloat16, kernel_device, seed) for seed in (0, 1))
    terms = make_terms(2, 33, kernel_device, 0.01)
    first = norm_act_backward(grad, y, terms, sums=True, config=CONFIG)
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: allocate(*args, **options).fill_(NAN))
    second = norm_act_backward(grad, y, terms, sums=True, config=CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_chosen_configuration(kernel_device):
    y = values((1, 3, 2, 3, 5), torch.float32, kernel_device)
    terms = make_terms(1, 3, kernel_device, 0.01)
    out, dz = nans(y), nans(y)
    norm_act(y, terms, out)
    assert_forward(out, y, terms)
    assert norm_act_backward(y, y, terms, dz=dz, sums=True) is not None
    fold(y, y, *terms[:3], out)
    assert bool(torch.isfinite(out).all() and torch.isfinite(dz).all())


def test_fake_tensors():
    with FakeTensorMode():
        y = empty((2, 5, 3, 4, 6), torch.bfloat16, torch.device("cpu"))
        terms = NormAct(*torch.empty(3, 2, 5), 0.01)
        norm_act(y, terms, torch.empty_like(y), config=CONFIG)
        dscale, dbeta = norm_act_backward(y, y, terms, sums=True, config=CONFIG)
    assert dscale.shape == dbeta.shape == (2, 5)


def test_what_is_refused(kernel_device):
    y = values((1, 3, 2, 3, 5), torch.float32, kernel_device)
    terms = make_terms(1, 3, kernel_device, 0.01)
    with pytest.raises(TypeError, match=r"y: expected float32.*float64"):
        norm_act(y.double(), terms, y, config=CONFIG)
    with pytest.raises(ValueError, match="out: expected shape"):
        norm_act(y, terms, y[:, :, :1], config=CONFIG)
    with pytest.raises(ValueError, match="out: expected channels last"):
        norm_act(y, terms, y.contiguous(), config=CONFIG)
    with pytest.raises(ValueError, match=r"scale: expected float32 of shape \(1, 3\)"):
        norm_act(y, terms._replace(scale=terms.scale[:, :2]), y, config=CONFIG)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(kernel_device):
    y = empty((1, 32, 65, 1024, 1025), torch.bfloat16, kernel_device).fill_(1)
    y[:, :, -1] = -2
    terms = make_terms(1, 32, kernel_device, 0.5)
    norm_act(y, terms, y)
    last = activated(torch.full((1, 32, 1, 1, 1), -2.0, device=kernel_device), terms)
    assert torch.equal(y[:, :, -1:], last.bfloat16().expand(1, 32, 1, 1024, 1025))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(*(st.integers(1, high) for high in (3, 40, 3, 9, 9))),
    slope=st.sampled_from((0.0, 0.01, 1.0, 2.0)),
    with_addend=st.booleans(),
    config=st.builds(
        Config,
        st.just("tile"),
        block_w=st.sampled_from((8, 32, 128)),
        block_n=st.sampled_from((16, 32, 64)),
        splits=st.integers(1, 12),
    ),
    seed=st.integers(0, 99),
)
def test_any_shape(dtype, shape, slope, with_addend, config, seed, kernel_device):
    y, grad = (values(shape, dtype, kernel_device, seed + i) for i in (0, 100))
    addend = values(shape, dtype, kernel_device, seed + 200) if with_addend else None
    terms = make_terms(*shape[:2], kernel_device, slope)
    out, dy, dz = nans(y), nans(y), nans(y)
    norm_act(y, terms, out, addend, config)
    assert_forward(out, y, terms, addend)
    a = out if with_addend else None
    sums = norm_act_backward(grad, y, terms, activated=a, dy=dy, dz=dz, sums=True, config=config)
    assert_backward((dz, dy, *sums), grad, y, terms, a)
