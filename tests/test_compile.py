"""torch.compile(fullgraph=True): values, gradients and kept bytes as in eager mode."""

import copy
import shutil

import pytest
import torch
from kept import bytes_kept_for_backward
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import effseg
from effseg import functional
from effseg.functional import Normalisation
from effseg.models import effsegnet
from effseg.models.levels import Architecture
from effseg.operators.normalisation import make_norm

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])


@pytest.fixture(autouse=True)
def compile_from_scratch():
    torch.manual_seed(0)
    torch._dynamo.reset()


def compiled(function, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, backend=backend)


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def terms(y):
    """Some normalisation of y, which learns."""
    return Normalisation(*(randn(*y.shape[:2], dtype=y.dtype) for _ in range(3)))


def weighed(output):
    """A scalar to which every element of every output counts differently."""
    outputs = [t for t in (output if isinstance(output, tuple) else (output,)) if t is not None]
    weights = [torch.linspace(0.5, 1.5, t.numel(), dtype=torch.float64).view(t.shape) for t in outputs]
    return sum((w * t.double()).sum() for w, t in zip(weights, outputs, strict=True))


def assert_as_eager(function, *inputs, atol=1e-9, backend="aot_eager"):
    leaves = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    found = []
    for run in (function, compiled(function, backend)):
        value = weighed(run(*inputs))
        found.append((value, *torch.autograd.grad(value, leaves)))
    for eager, got in zip(*found, strict=True):
        assert got.dtype == eager.dtype
        torch.testing.assert_close(got, eager, rtol=atol, atol=atol)


def image_and_labels(*size, dtype=torch.float64, classes=3):
    return torch.randn(1, 1, *size, dtype=dtype), torch.randint(0, classes, (1, *size))


@pytest.fixture
def network(monkeypatch):
    """Of few levels: those of a preset take a minute to compile."""
    monkeypatch.setitem(effsegnet.PRESETS, "small", Architecture((4, 6), (0, 1)))
    monkeypatch.setitem(effsegnet.PRESETS, "deep", Architecture((4, 4, 6, 6), (0, 1, 0, 0)))
    return lambda preset="small", **options: effseg.EffSegNet(1, 3, preset, **options)


# ---------------------------------------------------------------- operators
@DTYPES
@pytest.mark.parametrize("statistics", [True, False])
def test_conv3d(dtype, statistics):
    def run(x, weight, bias):
        return functional.conv3d(x, weight, bias, (1, 2, 2), statistics=statistics, slab_elements=200)

    x, weight, bias = (randn(*s, dtype=dtype) for s in [(2, 3, 5, 6, 7), (4, 3, 3, 3, 3), (4,)])
    assert_as_eager(run, x, weight, bias, atol=TOLERANCE[dtype])


@DTYPES
def test_materialised_expression_of_every_kind(dtype):
    def run(image, y, coarse, weight, lateral, norm, coarse_norm):
        inner = functional.plain(image)
        window = functional.convolution_window(3)
        skip = functional.convolved(inner, weight, window, norm, 0.1)
        below = functional.raw(coarse, coarse_norm, 0.0)
        joined = functional.upsample_add(skip, below, lateral)
        return functional.materialise(functional.residual(joined, y, norm, 0.2), slab_elements=300)

    image, y, coarse = (randn(*s, dtype=dtype) for s in [(1, 2, 5, 6, 7), (1, 4, 5, 6, 7), (1, 3, 3, 3, 4)])
    weight, lateral = randn(4, 2, 3, 3, 3, dtype=dtype), randn(4, 3, 1, 1, 1, dtype=dtype)
    arguments = (image, y, coarse, weight, lateral)
    norms = terms(y), terms(coarse)

    def flat(*tensors):
        return run(*tensors[:5], Normalisation(*tensors[5:8]), Normalisation(*tensors[8:]))

    assert_as_eager(flat, *arguments, *norms[0], *norms[1], atol=TOLERANCE[dtype])


def test_outputs_that_would_be_views():
    """The gradient of an expression that only hands x on is the gradient that came."""

    def run(x):
        given = functional.materialise(functional.plain(x)).clone()
        return functional.materialise(functional.residual(functional.plain(x), given, norm, 1.0))

    norm = Normalisation(*torch.ones(3, 1, 2, dtype=torch.float64))
    assert_as_eager(run, randn(1, 2, 4, 4, 4))


@DTYPES
def test_stem_statistics(dtype):
    def run(image, weight):
        return functional.stem_statistics(image, weight, 2, slab_elements=100)

    image = torch.randn(2, 1, 7, 6, 5, dtype=dtype)
    assert_as_eager(run, image, randn(4, 1, 3, 3, 3, dtype=dtype), atol=TOLERANCE[dtype])


@DTYPES
def test_segmentation_loss(dtype):
    def run(x, weight, bias, class_weights):
        options = dict(class_weights=class_weights, ignore_index=255, label_smoothing=0.1, batch_dice=True)
        return functional.segmentation_loss(x, labels, weight, bias, **options)

    labels = torch.randint(0, 4, (2, 5, 4, 3), dtype=torch.uint8)
    labels[0, 0] = 255
    x, weight, bias = (randn(*s, dtype=dtype) for s in [(2, 3, 5, 4, 3), (4, 3, 1, 1, 1), (4,)])
    assert_as_eager(run, x, weight, bias, torch.rand(4, dtype=dtype), atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("norm", "training"), [("instance", True), ("group", True), ("batch", False)])
@pytest.mark.parametrize("classes", [3, 20])  # the sums of the normalisation are collected, or swept for
def test_tail_segmentation_loss(dtype, norm, training, classes):
    def run(x, weight, head, bias, gamma, beta):
        deferred = functional.plain(x)
        return functional.tail_segmentation_loss(deferred, labels, (weight, module, 0.1), head, bias)

    module = make_norm(norm, 4).to(dtype).train(training)
    labels = torch.randint(0, classes, (2, 5, 4, 3))
    x, weight = randn(2, 3, 5, 4, 3, dtype=dtype), randn(4, 3, 3, 3, 3, dtype=dtype)
    head, bias = randn(classes, 4, 1, 1, 1, dtype=dtype), randn(classes, dtype=dtype)
    arguments = (x, weight, head, bias, module.weight, module.bias)
    assert_as_eager(run, *arguments, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["segment", "probabilities"])
@pytest.mark.parametrize("classes", [4, 300])
def test_segment(classes, name):
    x, weight, bias = (randn(*s) for s in [(2, 3, 5, 4, 3), (classes, 3, 1, 1, 1), (classes,)])
    function = getattr(functional, name)
    got, expected = compiled(function)(x, weight, bias), function(x, weight, bias)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


# ---------------------------------------------------------------- modules
def assert_module_as_eager(module, method, *batches, atol=1e-9, frames=None):
    """Values, gradients and buffers after every batch; `frames`: how often the method is compiled."""
    twin, backend = copy.deepcopy(module), CompileCounterWithBackend("aot_eager")
    run = compiled(method, backend)
    for batch in batches:
        found = []
        for function, one in ((method, module), (run, twin)):
            one.zero_grad()
            value = function(one, *batch)
            weighed(value).backward()
            gradients = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
            found.append((value.detach(), gradients, dict(one.named_buffers())))
        torch.testing.assert_close(found[1], found[0], rtol=atol, atol=atol)
    assert frames in (None, backend.frame_count)


def forward(module, *arguments):
    return module(*arguments)


def loss(model, image, labels):
    return model.loss(image, labels)


@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
def test_unit_of_any_size_compiles_twice(norm):
    """The second size makes sizes symbols, which every further one is an instance of."""
    unit = effseg.ConvNormAct3d(2, 8, stride=2, norm=norm).double()
    images = [(torch.randn(2, 2, *size).double(),) for size in [(7, 6, 5), (9, 8, 6), (10, 5, 7), (8, 11, 9)]]
    assert_module_as_eager(unit, forward, *images, frames=2)


def test_running_statistics_that_count_batches():
    unit = effseg.ConvNormAct3d(2, 4, norm="batch").double()
    unit.norm.momentum = None
    image = torch.randn(2, 2, 5, 4, 3).double()
    assert_module_as_eager(unit, forward, (image,), (2 * image,))


@pytest.mark.parametrize("recompute", [False, True])
def test_residual_block(recompute):
    def run(block, x):
        return functional.materialise(block.recomputed(functional.plain(x))) if recompute else block(x)

    block = effseg.ResidualBlock3d(4, "batch").double()
    assert_module_as_eager(block, run, (randn(2, 4, 5, 4, 3),))


@pytest.mark.parametrize(("memory", "sizes"), [("raw", 1), pytest.param("stream", 2, marks=pytest.mark.slow)])
def test_loss_of_a_network(network, memory, sizes):
    batches = [image_and_labels(*size) for size in [(9, 8, 10), (12, 9, 8)][:sizes]]
    assert_module_as_eager(network(memory=memory).double(), loss, *batches, frames=sizes)


@pytest.mark.parametrize("preset", ["small", "tiny"])
def test_logits_of_a_network(network, monkeypatch, preset):
    monkeypatch.setitem(effsegnet.PRESETS, "tiny", Architecture((4, 6), (1, 0), stem_stride=2))
    assert_module_as_eager(network(preset).double(), forward, image_and_labels(9, 8, 10)[:1])


@pytest.mark.slow
def test_network_with_every_option(network):
    model = network("deep", memory="stream", norm="batch", recompute=1, auxiliary=True, thick_axis=0)
    assert_module_as_eager(model.double(), loss, image_and_labels(8, 9, 10))


@pytest.mark.parametrize("memory", ["raw", "stream"])
def test_network_segments(network, memory):
    model, image = network(memory=memory).eval(), torch.randn(1, 1, 9, 8, 10)
    assert torch.equal(compiled(model.segment)(image), model.segment(image))


@pytest.mark.parametrize(("method", "dtype"), [(forward, torch.bfloat16), (loss, torch.float32)])
@torch.autocast("cpu", torch.bfloat16)
def test_autocast(network, method, dtype):
    """The types of eager mode: another one would show in the third digit."""
    batch = image_and_labels(9, 8, 10, dtype=torch.float32)[: 1 if method is forward else 2]
    model = network(memory="stream")
    assert method(model, *batch).dtype == dtype
    assert_module_as_eager(model, method, batch, atol=1e-4)


# ---------------------------------------------------------------- memory, errors, choices
@pytest.mark.parametrize(
    ("options", "autocast"),
    [(dict(memory="raw"), True), (dict(memory="stream"), False), (dict(recompute=1), False)],
    ids=str,
)
def test_no_more_is_kept_than_in_eager_mode(network, options, autocast):
    class Compiled(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.loss = model, compiled(model.loss)

    model, batch = network(**options), image_and_labels(16, 16, 16, dtype=torch.float32)
    eager = bytes_kept_for_backward(model, *batch, autocast)
    assert bytes_kept_for_backward(Compiled(model), *batch, autocast) <= eager


NORM = make_norm("instance", 3)


def tail_loss(x, labels):
    kernel = torch.ones(3, 3, 1, 1, 1)
    return functional.tail_segmentation_loss(functional.plain(x), labels, (kernel, NORM, 0.1), kernel)


@pytest.mark.parametrize("function", [functional.segmentation_loss, tail_loss])
def test_unknown_labels_are_refused(function):
    x, labels = torch.randn(1, 3, 4, 4, 8), torch.zeros(1, 4, 4, 8, dtype=torch.int16)
    run = compiled(function)
    run(x, labels)
    labels[0, 1, 2] = 7
    with pytest.raises(ValueError, match="labels: expected 0 to 2 or ignore_index, 8 voxels have other"):
        run(x, labels)


def test_another_forced_algorithm_is_compiled_anew():
    backend = CompileCounterWithBackend("aot_eager")
    run, x = (
        compiled(lambda x: functional.materialise(functional.plain(x)), backend),
        torch.ones(1, 1, 2, 2, 2),
    )
    for name in ("auto", "aten", "auto"):
        with effseg.algorithm(name):
            run(x)
    assert backend.frame_count == 2
    with effseg.algorithm("triton"), pytest.raises(Exception, match="triton"):
        run(x.double())


inductor = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
deprecated = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


@pytest.mark.slow
@inductor
@deprecated
def test_inductor():
    def run(image, weight):
        y, mean, var = functional.conv3d(image, weight)
        return functional.materialise(functional.raw(y, Normalisation(mean, var, mean), 0.1))

    assert_as_eager(run, randn(1, 2, 5, 4, 3), randn(4, 2, 3, 3, 3), backend="inductor")


@pytest.mark.slow
@inductor
@deprecated
def test_network_by_inductor(network):
    image, labels = image_and_labels(9, 8, 10)
    model = network(memory="stream").double()
    twin = copy.deepcopy(model)
    model.loss(image, labels).backward()
    compiled(twin.loss, "inductor")(image, labels).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
