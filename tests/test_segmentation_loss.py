"""The fused loss and argmax against the plain formula, MONAI, and their own memory bound."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_as_rounded, assert_exact, assert_no_worse_than_torch, rounding_noise
from torch.profiler import ProfilerActivity, profile

import effseg
from effseg import functional
from effseg.losses import dice_cross_entropy


def problem(n=2, k=5, c=4, size=(5, 6, 7), dtype=torch.float64, seed=0, label_dtype=torch.uint8):
    torch.manual_seed(seed)
    features = torch.randn(n, c, *size, dtype=dtype, requires_grad=True)
    weight = torch.randn(k, c, 1, 1, 1, dtype=dtype, requires_grad=True)
    bias = torch.randn(k, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, k, (n, *size)).to(label_dtype)
    return features, weight, bias, labels


OPTIONS = [
    {},
    {"ignore_index": 3},
    {"ignore_index": 255},
    {"include_background": True},
    {"batch_dice": True},
    {"label_smoothing": 0.1},
    {"dice_weight": 0.3, "ce_weight": 2.0},
    {"dice_weight": 0.0},
    {"smooth": 1.0},
    {"batch_dice": True, "label_smoothing": 0.2, "ignore_index": 255, "include_background": True},
]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_plain_formula(options, weighted):
    features, weight, bias, labels = problem()
    if options.get("ignore_index") == 255:
        labels[:, 2:4] = 255
    if weighted:
        options = options | {"class_weights": torch.rand(5, dtype=torch.float64) + 0.5}
    expected = dice_cross_entropy(F.conv3d(features, weight, bias), labels, **options)
    leaves = [features, weight, bias]
    grads = torch.autograd.grad(expected, leaves)
    for slab in (None, 1, 700):
        got = functional.segmentation_loss(features, labels, weight, bias, slab_elements=slab, **options)
        assert_exact(got, expected)
        for a, b in zip(torch.autograd.grad(got, leaves), grads, strict=True):
            assert_exact(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("algorithm", ["aten", "triton"])
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_dice": True, "smooth": 0.0}, {"label_smoothing": 0.1, "class_weights": torch.rand(5)}],
    ids=str,
)
def test_nothing_to_learn_from(options, algorithm, dtype):
    """A patch of ignored voxels only: loss 0, and gradients that are there and are zeros."""
    features, weight, bias, labels = problem(size=(3, 4, 5), c=16, dtype=dtype)
    labels = torch.full_like(labels, 255)
    with effseg.algorithm(algorithm):
        loss = functional.segmentation_loss(features, labels, weight, bias, ignore_index=255, **options)
        loss.backward()
    assert loss.item() == 0
    for leaf in (features, weight, bias):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("memory", ["raw", "stream"])
def test_a_network_has_nothing_to_learn_from(memory):
    torch.manual_seed(0)
    model = effseg.EffSegNet(1, 3, preset="tiny", memory=memory)
    labels = torch.full((1, 12, 10, 8), 3)
    loss = model.loss(torch.randn(1, 1, 12, 10, 8), labels, ignore_index=3)
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 3),
    k=st.integers(2, 9),
    c=st.integers(1, 6),
    size=st.tuples(*[st.integers(1, 7)] * 3),
    slab=st.one_of(st.none(), st.integers(1, 3000)),
    batch_dice=st.booleans(),
    include_background=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 10),
)
def test_equals_the_plain_formula_anywhere(n, k, c, size, slab, seed, **options):
    features, weight, bias, labels = problem(n, k, c, size, seed=seed)
    expected = dice_cross_entropy(F.conv3d(features, weight, bias), labels, **options)
    got = functional.segmentation_loss(features, labels, weight, bias, slab_elements=slab, **options)
    assert_exact(got, expected)
    leaves = [features, weight, bias]
    for a, b in zip(*(torch.autograd.grad(loss, leaves) for loss in (got, expected)), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("include_background", [False, True])
@pytest.mark.parametrize("batch", [False, True])
def test_equals_monai(include_background, batch):
    from monai.losses import DiceCELoss

    features, weight, bias, labels = problem()
    theirs = DiceCELoss(
        include_background=include_background, to_onehot_y=True, softmax=True, batch=batch,
        smooth_nr=1e-5, smooth_dr=1e-5, lambda_dice=0.7, lambda_ce=1.3,
    )  # fmt: skip
    expected = theirs(F.conv3d(features, weight, bias), labels[:, None].long())
    got = functional.segmentation_loss(
        features, labels, weight, bias, include_background=include_background, batch_dice=batch,
        dice_weight=0.7, ce_weight=1.3,
    )  # fmt: skip
    assert_exact(got, expected)
    a, b = (torch.autograd.grad(loss, features)[0] for loss in (got, expected))
    assert_exact(a, b)


def test_takes_logits_and_upsampled_logits():
    features, weight, bias, labels = problem()
    logits = F.conv3d(features, weight, bias)
    assert_exact(functional.segmentation_loss(logits, labels), dice_cross_entropy(logits, labels))
    fine = F.interpolate(logits, scale_factor=2, mode="trilinear", align_corners=False)[:, :, :9, :12, :13]
    labels = torch.randint(0, 5, (2, 9, 12, 13))
    up = functional.upsample_add(None, functional.plain(features), weight, bias, (9, 12, 13))
    got, expected = functional.segmentation_loss(up, labels), dice_cross_entropy(fine, labels)
    assert_exact(got, expected)
    leaves = [features, weight, bias]
    for a, b in zip(*(torch.autograd.grad(loss, leaves) for loss in (got, expected)), strict=True):
        assert_exact(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    features, weight, bias, labels = problem(1, 15, 16, (9, 10, 11))
    rounded = [t.detach().to(dtype) for t in (features, weight, bias)]

    def run(like, ours):
        leaves = [t.to(like).requires_grad_() for t in rounded]
        if ours:
            loss = functional.segmentation_loss(leaves[0], labels, *leaves[1:])
        else:
            loss = dice_cross_entropy(F.conv3d(*leaves), labels)
        names = ("loss", "features", "weight", "bias")
        return dict(zip(names, [loss.detach(), *torch.autograd.grad(loss, leaves)], strict=True))

    ours, exact = run(dtype, True), run(torch.float64, False)
    if dtype == torch.float32:
        assert_as_rounded(ours, exact, rounding_noise(lambda: run(torch.float64, False), exact))
        return
    torchs = run(dtype, False)
    for name, expected in exact.items():
        assert_no_worse_than_torch(ours[name], torchs[name], expected, dtype, name)


@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_dtype_and_with_a_channel(label_dtype):
    features, weight, bias, labels = problem(label_dtype=label_dtype)
    expected = dice_cross_entropy(F.conv3d(features, weight, bias), labels)
    assert_exact(functional.segmentation_loss(features, labels, weight, bias), expected)
    assert_exact(functional.segmentation_loss(features, labels[:, None], weight, bias), expected)


def test_unknown_labels_and_bad_shapes_are_named():
    features, weight, bias, labels = problem()
    bad = labels.clone()
    bad[0, 0, 0, :2] = 9
    loss = functional.segmentation_loss
    for call, message in [
        (lambda: loss(features, bad, weight, bias), "labels: expected 0 to 4 or ignore_index, 2 voxels"),
        (lambda: loss(features, labels[:, 1:], weight, bias), "labels: expected"),
        (lambda: loss(features, labels.float(), weight, bias), "labels: expected an integer type"),
        (lambda: loss(features, labels, weight[:, :2], bias), "weight: expected"),
        (
            lambda: loss(features, labels, weight, bias, class_weights=torch.ones(4)),
            "class_weights: expected",
        ),
        (lambda: loss(features, labels, weight, bias[:1]), "bias: expected"),
        (
            lambda: loss(features, labels, weight, bias, class_weights=torch.ones(5, requires_grad=True)),
            "class_w",
        ),
        (lambda: loss(features, labels, weight, bias, label_smoothing=2.0), "label_smoothing: expected"),
        (lambda: loss(features, labels, bias=bias), "bias: expected None"),
        (lambda: functional.segment(features, weight[:, :2]), "weight: expected"),
        (lambda: functional.probabilities(features, weight[:, :2]), "weight: expected"),
        (lambda: loss(features[:, :1], labels), "classes: expected 2 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert torch.isfinite(loss(features, bad, weight, bias, ignore_index=9))


def test_two_runs_give_the_same_bits():
    features, weight, bias, labels = problem(2, 15, 16, (20, 30, 10), torch.float32)
    runs = []
    for _ in range(2):
        loss = functional.segmentation_loss(features, labels, weight, bias)
        runs.append([loss, *torch.autograd.grad(loss, [features, weight, bias])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("k", [15, 118, 300])
def test_segment_is_the_argmax(k):
    features, weight, bias, _ = problem(2, k, 6, (6, 5, 9))
    expected = F.conv3d(features, weight, bias).argmax(1)
    for slab in (None, 1):
        got = functional.segment(features, weight, bias, slab_elements=slab)
        assert got.dtype == (torch.uint8 if k <= 256 else torch.int16)
        assert torch.equal(got.long(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [2, 15, 300])
def test_probabilities_are_the_softmax(k, dtype):
    """p moves by half of what logits do at most: sums of 6 products and a bias, each rounded to `dtype`."""
    features, weight, bias, _ = problem(2, k, 6, (6, 5, 9), dtype)
    wide = [t.detach().double() for t in (features, weight, bias)]
    logits = F.conv3d(*wide)
    largest = F.conv3d(*(t.abs() for t in wide)).max()
    for slab in (None, 1):
        got = functional.probabilities(features, weight, bias, slab_elements=slab)
        assert (got.dtype, got.device.type, got.requires_grad) == (torch.float16, "cpu", False)
        error = (got.double() - logits.softmax(1)).abs().max()
        assert error <= 2**-12 + 7 * largest * torch.finfo(dtype).eps / 2
    of_logits = functional.probabilities(logits.detach())
    assert (of_logits.double() - logits.softmax(1)).abs().max() <= 2**-12


def peak_bytes(run):
    """Peak of the CPU allocator's live bytes during `run`, over what was live before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("k", [15, 118])
def test_memory_does_not_grow_with_the_classes(k):
    """Above the features and their gradient: 40 B/voxel at most."""
    features, weight, bias, labels = problem(1, k, 16, (128, 64, 64), torch.float32)
    voxels = labels.numel()
    step = peak_bytes(lambda: functional.segmentation_loss(features, labels, weight, bias).backward())
    gradient = features.numel() * 4
    assert gradient <= step <= gradient + 40 * voxels
    assert peak_bytes(lambda: functional.segment(features, weight, bias)) <= 40 * voxels
    probable = peak_bytes(lambda: functional.probabilities(features, weight, bias))
    assert 2 * k * voxels <= probable <= (2 * k + 40) * voxels


def test_wrong_types_are_named():
    features, weight, bias, labels = problem()
    for call, message in [
        (
            lambda: functional.segmentation_loss(features, labels.numpy(), weight, bias),
            "labels: expected a tensor",
        ),
        (
            lambda: functional.segmentation_loss(features, labels, weight, bias, class_weights=[1.0]),
            "class_weights",
        ),
        (lambda: functional.segmentation_loss(features, labels, weight, bias, speed=2), "speed"),
    ]:
        with pytest.raises(TypeError, match=message):
            call()


def test_logits_keep_their_precision_under_autocast():
    """They are what a network gave; only a product with a weight would run in the autocast type."""
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 4, 8, 8, 8) + 50, torch.randint(0, 4, (1, 8, 8, 8))
    expected = functional.segmentation_loss(logits, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(functional.segmentation_loss(logits, labels), expected)
        assert torch.equal(functional.segment(logits).long(), logits.argmax(1))


def test_classes_ruled_out_by_an_infinite_logit():
    logits = torch.randn(1, 3, 4, 4, 4, dtype=torch.float64)
    logits[:, 1] = -torch.inf
    labels = torch.zeros(1, 4, 4, 4, dtype=torch.uint8)
    assert_exact(functional.segmentation_loss(logits, labels), dice_cross_entropy(logits, labels))
