"""Operators over deferred expressions against plain torch: values, every gradient, memory kept."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from expressions import KINDS, Case, assert_convolved, leaf, reference_conv
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_exact, relative_error

from effseg import functional
from effseg.expressions.base import Normalisation

EPS = 1e-5
LAST = torch.channels_last_3d


@pytest.fixture(autouse=True)
def _poison():
    """Fresh memory is NaN, so an element that no operator writes is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check_gradients(got, expected, leaves):
    """Several outputs at once, each with a random gradient."""
    grads = [torch.randn_like(t) for t in expected]
    for i, (a, b) in enumerate(
        zip(*(torch.autograd.grad(outputs, leaves, grads) for outputs in (got, expected)), strict=True)
    ):
        assert_exact(a, b, f"leaf {i}")


@pytest.mark.parametrize("slab", [None, 1, 90, 10**9])
@pytest.mark.parametrize("kind", KINDS)
def test_materialise(kind, slab):
    case = Case(kind)
    got, expected = functional.materialise(case.deferred(), slab_elements=slab), case.eager()
    assert_exact(got, expected)
    check_gradients([got], [expected], case.leaves())


@pytest.mark.parametrize("slab", [None, 1, 90])
@pytest.mark.parametrize("kind", KINDS)
def test_conv3d_of_every_expression(kind, slab):
    case = Case(kind)
    weight, bias = leaf(6, 3, 3, 3, 3), leaf(6)
    got = functional.conv3d(case.deferred(), weight, bias, slab_elements=slab)
    expected = reference_conv(case.eager(), weight, bias, (3, 3, 3), (1, 1, 1))
    for a, b in zip(got, expected, strict=True):
        assert_exact(a, b)
    check_gradients(got, expected, [*case.leaves(), weight, bias])


SHAPES = list(
    itertools.product(
        [(3, 3, 3), (1, 1, 1), (1, 3, 3), (3, 1, 1)],
        [(1, 1, 1), (2, 2, 2), (2, 2, 1), (1, 2, 2)],
        [(1, 1, 1), (2, 7, 3), (9, 4, 1), (11, 5, 6)],
    )
)


@pytest.mark.parametrize(("kernel", "stride", "size"), SHAPES)
@pytest.mark.parametrize("slab", [None, 1])
def test_conv3d_geometries(kernel, stride, size, slab):
    torch.manual_seed(0)
    case = Case("raw", n=1, size=size)
    weight = leaf(4, 3, *kernel)
    got = functional.conv3d(case.deferred(), weight, None, stride, slab_elements=slab)
    expected = reference_conv(case.eager(), weight, None, kernel, stride)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    grads = [torch.randn_like(t) for t in expected]
    for a, b in zip(
        *(torch.autograd.grad(o, [*case.leaves(), weight], grads) for o in (got, expected)), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 3),
    c=st.integers(1, 5),
    size=st.tuples(*[st.integers(1, 9)] * 3),
    kernel=st.tuples(*[st.sampled_from([1, 3])] * 3),
    stride=st.tuples(*[st.sampled_from([1, 2])] * 3),
    slab=st.one_of(st.none(), st.integers(1, 2000)),
)
def test_conv3d_anywhere(kind, n, c, size, kernel, stride, slab):
    case = Case(kind, n, c, size)
    weight = leaf(2, c, *kernel)
    got = functional.conv3d(case.deferred(), weight, None, stride, slab_elements=slab)
    expected = reference_conv(case.eager(), weight, None, kernel, stride)
    grads = [torch.randn_like(t) for t in expected]
    leaves = [*case.leaves(), weight]
    for a, b in zip(
        [*got, *torch.autograd.grad(got, leaves, grads)],
        [*expected, *torch.autograd.grad(expected, leaves, grads)],
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "channels"), [("raw", 16), ("residual", 17), ("up_add", 32), ("plain", 1)])
def test_conv3d_in_low_precision(dtype, kind, channels):
    """Statistics and gradients too."""
    torch.use_deterministic_algorithms(False)  # torch's own trilinear backward is not
    assert_convolved(dtype, kind, channels, (9, 11, 10))


def test_stem_statistics_equal_those_of_the_convolution():
    torch.manual_seed(0)
    image, weight = torch.randn(2, 2, 9, 6, 7, dtype=torch.float64) + 3, leaf(5, 2, 3, 3, 3)
    expected = reference_conv(image, weight, None, (3, 3, 3), (1, 1, 1))[1:]
    for slab in (None, 1, 500):
        got = functional.stem_statistics(image, weight, slab_elements=slab)
        for a, b in zip(got, expected, strict=True):
            assert_exact(a, b)
        grads = [torch.randn_like(t) for t in expected]
        a, b = (torch.autograd.grad(o, weight, grads, retain_graph=True)[0] for o in (got, expected))
        assert_exact(a, b)


def test_stem_statistics_of_an_integer_image():
    image = torch.randint(-1000, 1000, (1, 1, 8, 8, 8), dtype=torch.int16)
    weight = torch.randn(4, 1, 3, 3, 3)
    mean, var = functional.stem_statistics(image, weight)
    _, exact_mean, exact_var = reference_conv(image.double(), weight.double(), None, (3, 3, 3), (1, 1, 1))
    assert relative_error(mean, exact_mean) < 1e-5
    assert relative_error(var, exact_var) < 1e-5


def test_a_layer_keeps_only_its_raw_output():
    """Between convolutions only y is stored: the input of the next layer is what the last one saved."""
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(1, 8, 16, 16, 16)
    weights = [torch.randn(8, 8, 3, 3, 3, requires_grad=True) for _ in range(4)]
    scale = torch.ones(1, 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        h, outputs = functional.plain(x), []
        for w in weights:
            y, mean, var = functional.conv3d(h, w)
            outputs.append(y)
            h = functional.raw(y, Normalisation(mean, torch.rsqrt(var + EPS), scale), 0.01)
    features = [x, *outputs]
    expected = sum(t.numel() * 4 for t in features)
    small = sum(w.numel() * 4 for w in weights) + 4096
    assert expected <= sum(saved.values()) <= expected + small


def test_layouts_and_slices_are_taken_as_they_are():
    torch.manual_seed(0)
    big = torch.randn(2, 6, 9, 8, 7, dtype=torch.float64)
    weight = torch.randn(4, 3, 3, 3, 3, dtype=torch.float64)
    views = [
        big[:, ::2],
        big[:, ::2].contiguous(memory_format=LAST),
        big[:, ::2].transpose(2, 4).transpose(2, 4),
    ]
    expected = F.conv3d(views[0], weight, padding=1)
    for view in views:
        assert_exact(functional.conv3d(view, weight)[0], expected)


def test_bad_arguments_are_named():
    x, weight = torch.randn(1, 3, 4, 4, 4), torch.randn(2, 3, 3, 3, 3)
    for call, message in [
        (lambda: functional.conv3d(x[0], weight), "x: expected"),
        (lambda: functional.conv3d(x, weight[:, :2]), "weight: expected"),
        (lambda: functional.conv3d(x, torch.randn(2, 3, 2, 3, 3)), "kernel_size: expected odd"),
        (lambda: functional.conv3d(x, weight, stride=0), "stride: expected"),
        (lambda: functional.conv3d(x, weight, stride=(1, 2)), "stride: expected one whole number or three"),
        (lambda: functional.conv3d(x, weight, stride=(2.5, 1, 1)), "stride: expected one whole number"),
        (lambda: functional.conv3d(x, weight, torch.zeros(3)), "bias: expected"),
        (lambda: functional.conv3d(x.cfloat(), weight), "x: expected real numbers"),
        (lambda: functional.conv3d(functional.plain(x), weight, dtype=torch.float64), "dtype: expected"),
        (lambda: functional.plain(x.short()), "dtype: expected a floating-point type"),
        (lambda: functional.stem_statistics(x[:, :, :0], weight), "image: expected"),
        (lambda: functional.stem_statistics(x[:, :1], weight), "weight: expected"),
        (
            lambda: functional.stem_statistics(x.requires_grad_(), weight),
            "image: expected one without gradient",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_expressions_that_do_not_fit_are_named():
    """What a builder lets through, an operator would read out of bounds."""
    x, small = torch.randn(1, 3, 8, 6, 4), torch.randn(1, 2, 4, 3, 2)
    terms = Normalisation(*torch.zeros(3, 1, 3))
    weight, window = torch.randn(3, 2, 1, 1, 1), functional.convolution_window(3)
    f, fine, coarse = functional, functional.plain(x), functional.plain(small)
    for call, message in [
        (lambda: f.raw(x, Normalisation(*torch.zeros(3, 1, 2)), 0.1), "mean: expected"),
        (lambda: f.raw(x, terms, -1.0), "slope: expected 0 or more"),
        (lambda: f.residual(coarse, x, terms, 0.1), "inner: expected"),
        (lambda: f.convolved(fine, torch.randn(3, 2, 3, 3, 3), window, terms, 0.1), "weight: expected"),
        (lambda: f.upsample_add(fine, fine, torch.randn(3, 3, 1, 1, 1)), "coarse: expected"),
        (lambda: f.upsample_add(fine, coarse, torch.randn(1, 2, 1, 1, 1)), "skip: expected"),
        (lambda: f.upsample_add(fine, coarse, weight[:, :1]), "weight: expected"),
        (lambda: f.upsample_add(None, coarse, weight), "size: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="x: expected a tensor"):
        f.conv3d(x.numpy(), weight)


def test_backward_does_not_follow_autocast():
    x, weight = torch.randn(1, 3, 8, 8, 8), torch.randn(4, 3, 3, 3, 3, requires_grad=True)
    grads = []
    for enabled in (False, True):
        case = Case("up_add", dtype=torch.float32)
        y, mean, var = functional.conv3d(case.deferred(), weight)
        loss = y.square().sum() + mean.sum() + var.sum() + functional.materialise(functional.plain(x)).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(loss, [weight, *case.leaves()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_gradients_of_shared_weights_do_not_fade_over_many_slabs():
    """A sum of 512 slabs in bfloat16 would lose a fifth."""
    torch.manual_seed(0)
    coarse = torch.rand(1, 4, 128, 4, 4, dtype=torch.bfloat16)
    weight = torch.randn(3, 4, 1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    grads = []
    for slab in (1, None):
        up = functional.upsample_add(None, functional.plain(coarse), weight, size=(256, 8, 8))
        value = functional.materialise(up, slab_elements=slab)
        grads.append(torch.autograd.grad(value, weight, torch.ones_like(value))[0])
    assert relative_error(*grads) < 0.01
