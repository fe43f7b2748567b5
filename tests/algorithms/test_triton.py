"""The Triton algorithm behind the operators, against float64 torch; on a CPU in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from expressions import KINDS, Case, assert_convolved, leaf, plain_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_as_rounded, rounding_noise

import effseg
from effseg import EffSegNet, functional, peak_training_memory
from effseg.algorithms import select
from effseg.kernels import config, tuned
from effseg.losses import dice_cross_entropy

TINY = (1, 1, 3, 2, 4)
CLASSES = 5


def check(of, out_channels=16):
    with effseg.algorithm("triton"):
        assert_convolved(*of, out_channels=out_channels)


# Where an activation follows rounded values, a sign that flips among a hundred voxels is a large error.
STEADY = ("plain", "raw", "up", "up_add")
CASES = [(kind, torch.float32) for kind in KINDS] + [(kind, torch.bfloat16) for kind in STEADY]


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_convolution_of_every_expression(kind, dtype):
    check((dtype, kind, 16 if kind != "up" else 17, (3, 5, 6)))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    case=st.sampled_from([*CASES, *((kind, torch.float16) for kind in STEADY)]),
    channels=st.integers(1, 40),
    out_channels=st.integers(1, 40),
    size=st.tuples(*[st.integers(1, 9)] * 3),
)
def test_convolution_of_any_expression(case, channels, out_channels, size):
    kind, dtype = case
    if size[0] * size[1] * size[2] < 8:  # the variance of a few voxels is a cancelled difference
        size = (2, 2, size[2] + 1)
    if dtype != torch.float32:  # of a few numbers torch's own rounding errors may cancel by chance
        channels, out_channels = max(channels, 8), max(out_channels, 8)
        d, h, w = (max(n, 3) for n in size)  # two coarse voxels along each axis
        size = d, h, w
    check((dtype, kind, channels, size), out_channels)


@pytest.mark.parametrize(
    ("kernel", "stride", "size"),
    [
        ((3, 3, 3), (1, 1, 1), (4, 3, 5)),
        ((3, 3, 3), (2, 2, 2), (7, 4, 5)),
        ((3, 3, 3), (2, 2, 1), (6, 1, 7)),
        ((1, 3, 3), (1, 1, 1), (3, 2, 5)),
        ((1, 3, 3), (2, 2, 2), (5, 4, 3)),
    ],
    ids=str,
)
def test_slabs_leave_no_seam(kernel, stride, size):
    """Backward walks over slabs of one output row; every gradient is that of the whole volume."""
    torch.manual_seed(0)
    case = Case("raw", n=1, c=3, size=size, dtype=torch.float32)
    weight = leaf(4, 3, *kernel, dtype=torch.float32)
    leaves = [*case.leaves(), weight]
    names = ("y", "mean", "var", "grad y", "grad mean", "grad scale", "grad beta", "grad weight")
    window = functional.convolution_window(kernel, stride)
    grads = [torch.randn(1, 4, *window.output_size(size)), torch.randn(1, 4), torch.randn(1, 4)]

    def exactly():
        wide = [t.detach().double().requires_grad_() for t in leaves]
        a = F.leaky_relu(plain_norm(*wide[:4]), 0.01)
        y = F.conv3d(a, wide[4], None, stride, tuple(k // 2 for k in kernel))
        var, mean = torch.var_mean(y, (2, 3, 4), correction=0)
        outputs = [y, mean, var]
        return named([*outputs, *torch.autograd.grad(outputs, wide, [g.double() for g in grads])], names)

    with effseg.algorithm("triton"):
        got = functional.conv3d(case.deferred(), weight, None, stride, slab_elements=1)
        found = torch.autograd.grad(got, leaves, grads)
    exact = exactly()
    assert_as_rounded(named([*got, *found], names), exact, rounding_noise(exactly, exact))


def named(tensors, names):
    return {name: t.detach() for name, t in zip(names, tensors, strict=True)}


@pytest.mark.parametrize("options", [{}, {"ignore_index": 2, "label_smoothing": 0.1}], ids=str)
def test_loss_of_features_and_of_logits(options):
    torch.manual_seed(0)
    features, labels = leaf(2, 7, 3, 5, 6, dtype=torch.float32), torch.randint(0, 5, (2, 3, 5, 6))
    weight, bias = leaf(5, 7, 1, 1, 1, dtype=torch.float32), leaf(5, dtype=torch.float32)
    names = ("loss", "of logits", "grad features", "grad weight", "grad bias")

    def exactly():
        wide = [t.detach().double().requires_grad_() for t in (features, weight, bias)]
        loss = dice_cross_entropy(F.conv3d(*wide), labels, **options)
        return named([loss, loss, *torch.autograd.grad(loss, wide)], names)

    logits = F.conv3d(*(t.double() for t in (features, weight, bias)))
    with effseg.algorithm("triton"):
        got = functional.segmentation_loss(features, labels, weight, bias, slab_elements=1, **options)
        found = torch.autograd.grad(got, [features, weight, bias])
        of_logits = functional.segmentation_loss(logits.float(), labels, **options)
        segmented = functional.segment(features, weight, bias)
        probable = functional.probabilities(features, weight, bias)
    exact = exactly()
    assert_as_rounded(named([got, of_logits, *found], names), exact, rounding_noise(exactly, exact))
    assert torch.equal(segmented.long(), logits.argmax(1))
    assert (probable.double() - logits.softmax(1)).abs().max() <= 2**-11


def step(network, algorithm, image, labels):
    with effseg.algorithm(algorithm):
        loss = network.loss(image, labels)
    network.zero_grad()
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in network.named_parameters()}


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return torch.randn(TINY), torch.randint(0, CLASSES, (1, *TINY[2:]), dtype=torch.uint8)


def network_like(preset, memory, state=None, dtype=torch.float32):
    network = EffSegNet(1, CLASSES, preset, memory=memory)
    if state is not None:
        network.load_state_dict(state)
    return network.to(dtype)


@pytest.mark.parametrize(
    ("preset", "memory"),
    [
        pytest.param("small", "raw", marks=pytest.mark.slow),
        ("small", "stream"),
        pytest.param("base", "raw", marks=pytest.mark.slow),
        pytest.param("base", "stream", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("small_preset")
def test_a_whole_step(preset, memory, tiny):
    """Loss and all gradients, on a volume whose deepest levels are one voxel."""
    image, labels = tiny
    state = network_like(preset, memory).state_dict()
    ours = step(network_like(preset, memory, state), "triton", image, labels)
    exact_network = network_like(preset, memory, state, torch.float64)

    def exactly():
        return step(exact_network, "aten", image.double(), labels)

    exact = exactly()
    noise = rounding_noise(exactly, exact)
    # What one voxel normalised to nothing passes on is rounding alone.
    more_than_noise = {name: value for name, value in exact.items() if noise[name] < 0.1}
    assert len(more_than_noise) > len(exact) / 3
    assert_as_rounded(ours, more_than_noise, noise)


@pytest.mark.slow
def test_two_runs_give_the_same_bits():
    """A block, an upsampled sum and the head: every kernel that adds up."""
    torch.manual_seed(0)
    case = Case("up_add", n=1, c=16, size=(3, 5, 9), dtype=torch.float32)
    head = leaf(3, 16, 1, 1, 1, dtype=torch.float32)
    weight, labels = leaf(16, 16, 3, 3, 3, dtype=torch.float32), torch.randint(0, 3, (1, 3, 5, 9))

    def run():
        with effseg.algorithm("triton"):
            y, mean, var = functional.conv3d(case.deferred(), weight)
            norm = functional.Normalisation(mean, var.rsqrt(), mean)
            loss = functional.segmentation_loss(functional.raw(y, norm, 0.01), labels, head)
        return [loss, *torch.autograd.grad(loss, [*case.leaves(), weight, head])]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize(
    ("preset", "memory", "size"),
    [
        ("base", "stream", (192, 192, 192)),
        pytest.param("base", "raw", (192, 192, 192), marks=pytest.mark.slow),
    ],
)
def test_memory_is_no_more_than_with_aten(preset, memory, size):
    """On fake tensors, which no kernel reads."""
    found = []
    for algorithm in ("triton", "aten"):
        with effseg.algorithm(algorithm):
            network = EffSegNet(1, 15, preset, memory=memory)
            found.append(peak_training_memory(network, (1, 1, *size), device="cuda"))
    ours, aten = found
    assert ours.peak <= aten.peak
    assert ours.split["saved"] <= aten.split["saved"]
    assert ours.after_forward <= 1.001 * aten.after_forward


def test_the_choice(monkeypatch, tmp_path):
    """Kernels where they have been measured."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert select(cuda, torch.bfloat16).__name__.endswith("aten.ops")
    (file,) = (path for path in tuned.tuned_files("nvidia-h100") if path.is_relative_to(tmp_path))
    file.parent.mkdir(parents=True)
    file.write_text(tuned.tuned_document({"fold bf16": config.Config("tile")}))
    tuned.read_tuned.cache_clear()
    assert select(cuda, torch.bfloat16).__name__.endswith("triton.ops")
    assert select(cuda, torch.float64).__name__.endswith("aten.ops")
    assert select(cpu, torch.float32).__name__.endswith("aten.ops")
    with effseg.algorithm("aten"):
        assert select(cuda, torch.float32).__name__.endswith("aten.ops")
    with (
        effseg.algorithm("triton"),
        pytest.raises(ValueError, match=r"algorithm: triton computes in float32, .*, got float64"),
    ):
        functional.conv3d(leaf(1, 1, 2, 2, 2), leaf(1, 1, 1, 1, 1))
