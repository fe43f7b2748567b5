"""memory="stream" without full-resolution features: what a step keeps, makes and computes; predictions."""

import pytest
import torch
from kept import bytes_kept_for_backward
from streamed import CUBE, WIDTH, batch, network, rows
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effseg.memory import measure_training_memory, peak_training_memory

aten = torch.ops.aten
pytestmark = pytest.mark.usefixtures("few_levels")


# ---------------------------------------------------------------- memory
@pytest.mark.parametrize(("autocast", "bar"), [(True, 49), (False, 92)], ids=["bf16", "fp32"])
def test_bytes_kept_for_backward(autocast, bar):
    """Per voxel, in bf16, 44.3: the batch (float32 image 4, uint8 labels 1), the four raw outputs of 32
    channels at half the resolution (the unit that enters level 1, the two convolutions of its block, the
    decoder's: 8 each), the four of 48 at a quarter (1.5 each), the coarser ones (1.2 together) and small
    sums. The bar is 10 % above; a single tensor more at half the resolution breaks it."""
    image, labels = batch(CUBE, 15, torch.float32)
    model = network("stream", 1, 15)
    per_voxel = bytes_kept_for_backward(model, image, labels, autocast) / image.numel()
    assert 0.85 * bar < per_voxel <= bar


class LargestStorage(TorchDispatchMode):
    """The largest storage that any operator answers with, in elements, and the tensor's shape."""

    def __init__(self, but=None):
        super().__init__()
        self.largest, self.but = (0, (), ""), but

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.dtype != self.but:
                elements = t.untyped_storage().nbytes() // t.element_size()
                self.largest = max(self.largest, (elements, tuple(t.shape), str(func)))
        return out


@pytest.mark.parametrize("classes", [4, 40], ids=["collected", "swept"])
def test_no_full_resolution_feature_map_ever_exists(classes):
    """The largest tensor of a whole step, and of a segmentation, is a feature map of half the resolution:
    32 channels on an eighth of the voxels, 4 elements a voxel."""
    image, labels = batch((1, 1, 128, 20, 20), classes, torch.float32)
    raw, stream = (
        network(memory, 1, classes, "few", slab=rows(4, image.shape)) for memory in ("raw", "stream")
    )
    with LargestStorage() as control:
        raw.loss(image, labels)
    assert control.largest[0] >= WIDTH * image.numel()
    with LargestStorage() as seen:
        stream.loss(image, labels).backward()
        stream.segment(image)
    assert seen.largest[0] <= 4 * image.numel(), seen.largest
    with LargestStorage(but=torch.float16) as seen:  # what is asked for, in the host's memory
        stream.probabilities(image)
    assert seen.largest[0] <= 4 * image.numel(), seen.largest


class Multiplications(TorchDispatchMode):
    """Multiply-adds of convolutions (zero padding included) and of matrix products."""

    def __init__(self):
        super().__init__()
        self.convolutions = self.products = 0

    @property
    def total(self):
        return self.convolutions + self.products

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (aten.convolution.default, aten.mkldnn_convolution.default):
            self.convolutions += out.numel() * args[1][0].numel()
        elif func is aten.convolution_backward.default:
            grad, _, weight, *_, mask = args
            self.convolutions += grad.numel() * weight[0].numel() * (mask[0] + mask[1])
        elif func in (aten.mm.default, aten.bmm.default):
            self.products += out.numel() * args[0].shape[-1]
        elif func is aten.addmm.default:
            self.products += out.numel() * args[1].shape[-1]
        return out


def multiplications(memory, size, classes=15, preset="base", levels=0):
    """Of forward and backward, on fake tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True), Multiplications() as counted:
        model = network(memory, 1, classes, preset, recompute=levels)
        image, labels = torch.empty(1, 1, *size), torch.empty(1, *size, dtype=torch.uint8)
        model.loss(image, labels).backward()
    return counted.total


@pytest.mark.parametrize(
    ("preset", "size"),
    [("few", (64, 64, 64)), ("base", (512, 512, 512))],
)
@pytest.mark.slow
def test_arithmetic_of_a_step(preset, size):
    raw = multiplications("raw", size, preset=preset)
    assert raw > 3 * 2 * 27 * WIDTH**2 * size[0] * size[1] * size[2]  # three passes of two layers
    ratio = multiplications("stream", size, preset=preset) / raw
    assert 1.0 < ratio <= 1.5


# ---------------------------------------------------------------- predictions
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "levels", "classes", "preset", "bar"),
    [
        ("bf16", 0, 15, "base", 60),
        ("bf16", 1, 15, "base", 44),
        ("fp32", 0, 15, "base", 118),
        ("fp32", 1, 15, "base", 88),
        ("bf16", 0, 118, "large-w32", 90),
    ],
)
def test_predicted_peak_of_a_512_cube(dtype, levels, classes, preset, bar):
    report = peak_training_memory(
        lambda: network("stream", 1, classes, preset, recompute=levels), (1, 1, 512, 512, 512), dtype=dtype
    )
    assert 0.85 * bar < report.bytes_per_voxel <= bar, report.where


@pytest.mark.parametrize(
    ("shape", "slab", "levels"),
    [
        pytest.param((1, 1, 48, 40, 40), 2**16, 0, marks=pytest.mark.slow),
        pytest.param((1, 1, 48, 40, 40), 2**16, 1, marks=pytest.mark.slow),
        pytest.param((1, 1, 96, 96, 96), None, 0, marks=pytest.mark.slow),
        pytest.param((1, 1, 96, 96, 96), None, 1, marks=pytest.mark.slow),
    ],
    ids=["thin-slabs", "thin-slabs-recomputed", "96", "96-recomputed"],
)
def test_prediction_equals_the_measured_step(shape, slab, levels):
    make = lambda: network("stream", 1, 15, recompute=levels, slab=slab)  # noqa: E731
    predicted = peak_training_memory(make, shape, dtype="fp32")
    measured = measure_training_memory(make, shape, 15, dtype="fp32")
    assert predicted.peak == pytest.approx(measured.outside_convolutions, rel=0.05)
