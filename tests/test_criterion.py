"""The loss of whatever a network returns."""

import copy

import pytest
import torch
from convertible import make
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import effseg
from effseg.conversion import LazyTensor
from effseg.criterion import nearest, nnunet_weights
from effseg.errors import InputError
from effseg.losses import dice_cross_entropy


def labels_for(image, classes=3, dtype=torch.int64):
    return torch.randint(classes, (image.shape[0], *image.shape[2:]), dtype=dtype)


@pytest.mark.diagonal
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ignore_index": 2, "batch_dice": True},
        {"class_weights": torch.tensor([0.2, 1.0, 3.0]), "label_smoothing": 0.1, "include_background": True},
    ],
)
@pytest.mark.parametrize("name", ["plain", "plain deep", "basic", "segresnet", "dynunet residual, deep"])
def test_converted_network_and_original_have_one_loss(name, options, monkeypatch):
    network, image = make(name)
    converted = effseg.convert(copy.deepcopy(network))
    labels = labels_for(image)
    criterion = effseg.SegmentationLoss(**options).double()
    found = []
    for each in (network, converted):
        loss = criterion(each(image), labels)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in each.parameters() if p.grad is not None)])
    whole = torch.stack([g.norm() for g in found[0]]).norm()
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-9 * whole


@pytest.mark.parametrize("name", ["plain", "plain deep", "basic"])
def test_logits_of_a_converted_network_are_never_made(name, monkeypatch):
    network, image = make(name)
    converted = effseg.convert(network)
    outputs = converted(image)
    monkeypatch.setattr(LazyTensor, "materialise", lambda _: pytest.fail("logits were made"))
    effseg.SegmentationLoss()(outputs, labels_for(image)).backward()


def test_it_is_the_loss_of_one_output():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 5, 6, 7), torch.randint(4, (2, 5, 6, 7), dtype=torch.uint8)
    expected = dice_cross_entropy(logits, labels)
    criterion = effseg.SegmentationLoss()
    assert criterion(logits, labels) == expected
    assert criterion(logits, labels[:, None].float()) == expected
    assert criterion([logits], [labels]) == expected
    assert criterion(logits.half(), labels).dtype == torch.float32


def test_outputs_are_weighted_as_in_nnunet():
    assert nnunet_weights(1) == (1.0,)
    assert nnunet_weights(2) == (1.0, 0.0)
    assert nnunet_weights(4) == pytest.approx((4 / 7, 2 / 7, 1 / 7, 0))
    torch.manual_seed(0)
    outputs = [torch.randn(1, 3, n, n, n) for n in (8, 4, 2)]
    labels = torch.randint(3, (1, 8, 8, 8))
    small = [labels, labels[:, 1::2, 1::2, 1::2], labels[:, 2::4, 2::4, 2::4]]
    parts = [dice_cross_entropy(o, s) for o, s in zip(outputs, small, strict=True)]
    torch.testing.assert_close(effseg.SegmentationLoss()(outputs, labels), (2 * parts[0] + parts[1]) / 3)
    torch.testing.assert_close(effseg.SegmentationLoss()(outputs, small), (2 * parts[0] + parts[1]) / 3)
    weighted = effseg.SegmentationLoss([0, 0.5, 2])(tuple(outputs), labels)
    torch.testing.assert_close(weighted, 0.5 * parts[1] + 2 * parts[2])
    stacked = torch.stack([outputs[0], outputs[0] + 1, outputs[0] * 2], 1)
    torch.testing.assert_close(
        effseg.SegmentationLoss((1, 1, 1))(stacked, labels),
        sum(dice_cross_entropy(o, labels) for o in stacked.unbind(1)),
    )


def outputs_of(kind):
    """Logits (1, 3, 4, 5, 6) of a network: stored, or lazy ones of a converted network."""
    torch.manual_seed(0)
    image = torch.randn(1, 2, 4, 5, 6)
    network = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.Conv3d(4, 3, 1))
    found = (network if kind == "stored" else effseg.convert(network, leave_alone=False))(image)
    assert isinstance(found, LazyTensor) == (kind == "lazy")
    return found


KINDS = ("stored", "lazy")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_labels_of_a_float_type_are_rounded(kind, dtype):
    outputs, criterion = outputs_of(kind), effseg.SegmentationLoss(ignore_index=255)
    labels = labels_for(outputs)
    labels[0, 0, 0, :3] = 255
    expected = criterion(outputs, labels)
    for noise in (0, 1e-6, -1e-6, -9e-4):  # as resampling leaves
        assert criterion(outputs, labels.to(dtype) + noise) == expected


@pytest.mark.parametrize("ignored", [-1, 255, 32767, 65535, -32768, -(2**31)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_may_be_ignored(kind, ignored):
    outputs, criterion = outputs_of(kind), effseg.SegmentationLoss(ignore_index=ignored)
    labels = labels_for(outputs)
    labels[0, 0] = ignored
    expected = criterion(outputs, labels)
    assert criterion(outputs, labels.double()) == expected
    labels = labels.double()
    labels[0, 1, 1, :4] = torch.nan
    with pytest.raises(InputError, match="ignore_index, 4 voxels have other values"):
        criterion(outputs, labels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "bad",
    [0.5, 1.01, -0.01, 3.0, -1.0, 65538.0, 2.0**32, 1e30, torch.nan, torch.inf, 3, -1, 65538, 2**32 + 2],
)
def test_what_is_no_class_is_refused(kind, bad):
    """Not taken for another class, whatever an integer type would make of it."""
    outputs = outputs_of(kind)
    labels = labels_for(outputs).to(torch.float32 if isinstance(bad, float) else torch.int64)
    labels[0, 2, 3, 3:5] = bad
    with pytest.raises(
        InputError, match=r"^labels: expected 0 to 2 or ignore_index, 2 voxels have other valu"
    ):
        effseg.SegmentationLoss()(outputs, labels)


def test_labels_of_a_float_type_are_not_waited_for():
    """The host asks the device for as much as with integers: one number."""

    class Watch(TorchDispatchMode):
        asked = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.asked += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    outputs = outputs_of("lazy")
    for dtype in (torch.int64, torch.float32):
        with Watch() as watch:
            effseg.SegmentationLoss()(outputs, labels_for(outputs).to(dtype))
        assert watch.asked == 1


def test_labels_of_a_float_type_in_a_compiled_and_in_a_fake_step():
    logits, criterion = torch.randn(1, 3, 4, 5, 6), effseg.SegmentationLoss()
    labels = labels_for(logits)
    run = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(logits, labels.float() - 1e-6), criterion(logits, labels))
    with pytest.raises(RuntimeError, match="out of bounds"):
        run(logits, labels.float() + 0.5)
    with FakeTensorMode():
        assert criterion(torch.randn(1, 3, 4, 5, 6), torch.full((1, 4, 5, 6), 0.5)).shape == ()


@pytest.mark.parametrize("size", [(4, 4, 4), (5, 3, 7), (10, 9, 8), (20, 9, 1)])
def test_labels_are_taken_as_torch_does(size):
    torch.manual_seed(0)
    labels = torch.randint(100, (2, 10, 9, 8))
    logits = torch.zeros(2, 3, *size)
    expected = torch.nn.functional.interpolate(labels[:, None].double(), size, mode="nearest-exact")[:, 0]
    assert torch.equal(nearest(labels, logits), expected.long())


@pytest.mark.parametrize(
    ("outputs", "labels", "options", "line"),
    [
        (
            [torch.zeros(1, 2, 4, 4, 4)] * 2,
            [torch.zeros(1, 4, 4, 4)],
            {},
            "labels: expected one for each of 2 outputs, got 1",
        ),
        (
            [torch.zeros(1, 2, 4, 4, 4)] * 2,
            torch.zeros(1, 4, 4, 4),
            {"weights": (1, 2, 3)},
            "outputs: expected 3",
        ),
        (torch.zeros(1, 2, 4, 4, 4), torch.zeros(1, 2, 4, 4, 4), {}, r"labels: expected \(N, D, H, W\)"),
        (torch.zeros(1, 2, 4, 4, 4), torch.zeros(2, 4, 4, 4), {}, "labels: expected the logits' shape"),
    ],
)
def test_wrong_arguments(outputs, labels, options, line):
    with pytest.raises(ValueError, match=line):
        effseg.SegmentationLoss(**options)(outputs, labels)


def test_wrong_options_are_named_at_once():
    with pytest.raises(TypeError, match="unexpected keyword argument 'gamma'"):
        effseg.SegmentationLoss(gamma=2)
    with pytest.raises(ValueError, match="label_smoothing: expected 0 to 1"):
        effseg.SegmentationLoss(label_smoothing=3)
