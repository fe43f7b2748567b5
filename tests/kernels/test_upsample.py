"""Trilinear upsampling of slabs, and its transpose."""

import faults
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_rounded, slack
from torch._subclasses.fake_tensor import FakeTensorMode

from effseg.kernels.config import Config
from effseg.kernels.launch import empty
from effseg.kernels.upsample import upsample_x2, upsample_x2_transpose

NAN = float("nan")
CONFIG = Config("tile", block_d=2, block_h=8, block_w=8, block_n=16)

# dtype, (N, C), coarse size, factors, what is cut off height and width, rows
CASES = [
    (torch.float32, (1, 1), (1, 1, 1), (2, 2, 2), (0, 0), (0, 2)),
    (torch.float32, (2, 5), (3, 4, 5), (2, 2, 2), (0, 1), (1, 6)),
    (torch.bfloat16, (1, 16), (4, 7, 7), (2, 2, 2), (1, 0), (0, 7)),
    (torch.bfloat16, (1, 48), (3, 2, 2), (2, 2, 2), (0, 0), (3, 4)),
    (torch.float16, (1, 17), (2, 3, 2), (1, 2, 2), (1, 1), (0, 2)),
    (torch.float32, (2, 3), (3, 2, 7), (2, 1, 2), (0, 0), (2, 5)),
    (torch.float32, (1, 3), (2, 7, 2), (2, 2, 1), (1, 0), (0, 4)),
    (torch.float32, (1, 3), (2, 3, 5), (1, 1, 1), (0, 0), (0, 2)),
]


def values(shape, dtype, device, seed=0):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return t.to(device, dtype).contiguous(memory_format=torch.channels_last_3d)


def nans(like):
    return torch.full_like(like, NAN, memory_format=torch.preserve_format)


def reference(x, rows, height, width, factors):
    factors = tuple(map(float, factors))
    whole = F.interpolate(x, scale_factor=factors, mode="trilinear", align_corners=False)
    return whole[:, :, rows[0] : rows[1], :height, :width]


def check(dtype, samples_channels, size, factors, cut, rows, config, device, seed=0):
    """Both directions, with an addend, against torch in float64."""
    x = values((*samples_channels, *size), dtype, device, seed)
    height, width = (s * f - c for s, f, c in zip(size[1:], factors[1:], cut, strict=True))
    window = (rows, height, width, factors)
    fine = (*samples_channels, rows[1] - rows[0], height, width)
    addend, grad = (values(fine, dtype, device, seed + i) for i in (1, 2))
    out = nans(addend)
    upsample_x2(x, out, rows=rows, factors=factors, addend=addend, config=config)
    exact, size = (reference(sign(x.cpu().double()), *window) for sign in (torch.positive, torch.abs))
    addend = addend.cpu().double()
    assert_rounded(out, exact + addend, slack(size + addend.abs()), "upsample")

    coarse = nans(x)
    upsample_x2_transpose(grad, coarse, rows=rows, factors=factors, config=config)
    leaf = x.detach().cpu().double().requires_grad_()
    fine, grad = reference(leaf, *window), grad.cpu().double()
    exact, size = (torch.autograd.grad(fine, leaf, g, retain_graph=True)[0] for g in (grad, grad.abs()))
    assert_rounded(coarse, exact, slack(size), "transpose")


@pytest.mark.parametrize(("dtype", "samples_channels", "size", "factors", "cut", "rows"), CASES)
def test_against_torch(dtype, samples_channels, size, factors, cut, rows, kernel_device):
    check(dtype, samples_channels, size, factors, cut, rows, CONFIG, kernel_device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", [faults.border, faults.row])
@pytest.mark.parametrize("name", ["upsample_x2", "upsample_x2_transpose"])
def test_a_fault_is_seen(name, fault, dtype, kernel_device, monkeypatch):
    monkeypatch.setitem(globals(), name, faults.after(globals()[name], 1, fault))
    with pytest.raises(AssertionError, match="elements wrong"):
        check(dtype, (1, 5), (2, 2, 3), (2, 2, 2), (0, 1), (0, 3), CONFIG, kernel_device)


def test_small_tiles(kernel_device):
    config = Config("tile", block_d=1, block_h=2, block_w=4, block_n=16)
    check(torch.float32, (1, 17), (2, 2, 4), (2, 2, 2), (0, 1), (1, 3), config, kernel_device)


def test_without_addend_a_constant_stays_itself(kernel_device):
    x = torch.full((1, 1, 2, 3, 2), 0.1, device=kernel_device)
    out = nans(empty((1, 1, 4, 6, 4), x.dtype, kernel_device))
    upsample_x2(x, out, rows=(0, 4), config=CONFIG)
    assert torch.equal(out, torch.full_like(out, 0.1))


def test_any_layout_and_slabs(kernel_device):
    """Channels first, and rows of larger tensors: what is around them is not touched. The same bits."""
    whole = values((2, 3, 4, 2, 3), torch.float32, kernel_device)
    x, first = whole[:, :, 1:3], whole[:, :, 1:3].contiguous()
    outs = torch.full((2, 3, 6, 4, 6), 7.0, device=kernel_device)
    outs = outs.contiguous(memory_format=torch.channels_last_3d)
    plain = nans(empty((2, 3, 3, 4, 6), x.dtype, kernel_device))
    upsample_x2(first, plain, rows=(1, 4), config=CONFIG)
    upsample_x2(x, outs[:, :, 2:5], rows=(1, 4), config=CONFIG)
    assert torch.equal(outs[:, :, 2:5], plain)
    assert bool((outs[:, :, :2] == 7).all() and (outs[:, :, 5:] == 7).all())

    coarse = torch.full_like(whole, 7.0)
    alone = nans(whole[:, :, 1:3].contiguous(memory_format=torch.channels_last_3d))
    upsample_x2_transpose(outs[:, :, 2:5], coarse[:, :, 1:3], rows=(1, 4), config=CONFIG)
    upsample_x2_transpose(plain.contiguous(), alone, rows=(1, 4), config=CONFIG)
    assert torch.equal(coarse[:, :, 1:3], alone)
    assert bool((coarse[:, :, ::3] == 7).all())


def test_chosen_configuration(kernel_device):
    x, grad = (
        values((1, 3, 1, 2, 2), torch.float32, kernel_device),
        torch.ones(1, 3, 2, 4, 4, device=kernel_device),
    )
    fine, coarse = nans(grad.contiguous(memory_format=torch.channels_last_3d)), nans(x)
    upsample_x2(x, fine, rows=(0, 2))
    upsample_x2_transpose(grad, coarse, rows=(0, 2))
    assert torch.equal(coarse, torch.full_like(x, 8.0))
    torch.testing.assert_close(fine, reference(x, (0, 2), 4, 4, (2, 2, 2)))


def test_fake_tensors():
    with FakeTensorMode():
        x, out = (empty((2, 5, s, s, s), torch.bfloat16, torch.device("cpu")) for s in (3, 6))
        upsample_x2(x, out, rows=(0, 6), config=CONFIG)
        upsample_x2_transpose(out, x, rows=(0, 6), config=CONFIG)


@pytest.mark.parametrize(
    ("fine", "rows", "factors"),
    [
        ((1, 2, 4, 4, 4), (0, 3), (2, 2, 2)),
        ((1, 2, 3, 4, 4), (2, 5), (2, 2, 2)),
        ((1, 2, 4, 2, 4), (0, 4), (2, 2, 2)),
        ((1, 2, 4, 4, 5), (0, 4), (2, 2, 2)),
        ((1, 2, 1, 4, 4), (0, 1), (1, 2, 2)),
        ((1, 3, 4, 4, 4), (0, 4), (2, 2, 2)),
        ((1, 2, 4, 4, 6), (0, 4), (2, 2, 3)),
    ],
)
def test_what_is_refused(fine, rows, factors, kernel_device):
    coarse = empty((1, 2, 2, 2, 2), torch.float32, kernel_device)
    out = empty(fine, torch.float32, kernel_device)
    with pytest.raises(ValueError, match="expected coarse and fine"):
        upsample_x2(coarse, out, rows=rows, factors=factors, config=CONFIG)
    with pytest.raises(ValueError, match="expected coarse and fine"):
        upsample_x2_transpose(out, coarse, rows=rows, factors=factors, config=CONFIG)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(kernel_device):
    x = values((1, 32, 33, 1, 1), torch.bfloat16, kernel_device).expand(1, 32, 33, 512, 513).contiguous()
    out = nans(empty((1, 32, 66, 1024, 1025), x.dtype, kernel_device))
    upsample_x2(x, out, rows=(0, 66))
    assert torch.equal(out[:, :, -1:], x[:, :, -1:, :1, :1].expand(1, 32, 1, 1024, 1025))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_shape(data, kernel_device):
    size = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)))
    factors = data.draw(st.tuples(*[st.sampled_from((2, 2, 1))] * 3))
    # What is left of height and width must need every coarse voxel.
    cut = data.draw(st.tuples(*(st.integers(0, f - 1) for f in factors[1:])))
    rows = (0, size[0])
    if factors[0] == 2:
        first = data.draw(st.integers(0, 2 * size[0] - 1))
        rows = first, data.draw(st.integers(first + 1, 2 * size[0]))
    config = Config(
        "tile",
        block_d=data.draw(st.sampled_from((1, 2, 3, 8))),
        block_h=data.draw(st.sampled_from((4, 8))),
        block_w=8,
        block_n=data.draw(st.sampled_from((16, 32))),
    )
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    samples_channels = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 33))
    check(
        dtype,
        samples_channels,
        size,
        factors,
        cut,
        rows,
        config,
        kernel_device,
        data.draw(st.integers(0, 99)),
    )
