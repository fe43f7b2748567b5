"""The segmentation head's kernels against float64 torch, and against the ATen head's treatment of labels."""

import faults
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from convolution_cases import operand
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_rounded, slack, slack_of_sum, stored

from effseg.algorithms.aten.head import Head, Sums
from effseg.kernels import head as head_module
from effseg.kernels.config import Config
from effseg.kernels.head import HeadGradients, head_argmax, head_backward, head_sums

CLASSES, TILE = Config("classes", block_w=32, splits=2), Config("tile", block_w=32, splits=2)
MEASURES = ("intersection", "probability", "nll", "smooth_nll")


class Case:
    """A slab and its head; `dtype` is the features', labels include ignored (255 or -1) and unknown ones."""

    def __init__(
        self,
        device,
        channels=5,
        classes=3,
        size=(3, 5, 7),
        dtype=torch.float32,
        labels=torch.int64,
        ignore_index=None,
        weight=True,
        bias=True,
        seed=0,
    ):
        random = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=random, dtype=torch.float64)

        channels = channels if weight else classes
        self.features = normal(1, channels, *size).to(device, dtype)
        self.features = self.features.contiguous(memory_format=torch.channels_last_3d)
        self.weight = (normal(classes, channels) / channels**0.5).to(device, dtype) if weight else None
        self.bias = normal(classes).to(device, dtype) if weight and bias else None
        known = torch.randint(0, classes, size, generator=random)
        kind = torch.rand(size, generator=random)
        known[kind < 0.1] = classes
        if ignore_index is not None:
            known[kind > 0.9] = ignore_index
        self.labels = known.to(device, labels)
        self.class_weights = torch.rand(classes, generator=random).to(device) + 0.5
        self.ignore_index = ignore_index
        self.grads = HeadGradients(*(normal(*s).to(device) for s in ((classes,), (classes,), (), ())))

    def sums(self, config=TILE):
        return head_sums(*self.arguments, config=config)

    def backward(self, config=TILE, out=None, parameters=True):
        out = torch.full_like(self.features, float("nan")) if out is None else out
        return out, *head_backward(*self.arguments, self.grads, out, parameters=parameters, config=config)

    def argmax(self, config=TILE, dtype=torch.uint8):
        out = torch.full(self.labels.shape, 77, dtype=dtype, device=self.features.device)
        head_argmax(self.features, self.weight, self.bias, out, config=config)
        return out

    @property
    def arguments(self):
        return (
            self.features,
            self.weight,
            self.bias,
            self.labels,
            self.class_weights,
            self.ignore_index,
        )


class Exact:
    """What a case's kernels compute, in float64 with their operands rounded as they are, and its errors."""

    def __init__(self, case: Case) -> None:
        self.dtype = case.features.dtype
        a, self.a_size, self.a_open = (t[0] for t in operand(case.features, None, self.dtype))
        self.a, self.weight = a, None if case.weight is None else case.weight.cpu().double()
        self.logits, size, logits_open = a, self.a_size, self.a_open
        if self.weight is not None:
            bias = torch.zeros(len(self.weight)) if case.bias is None else case.bias.cpu()
            bias = bias.double()[:, None, None, None]
            self.logits = apply(self.weight, a) + bias
            size = apply(self.weight.abs(), self.a_size) + bias.abs()
            logits_open = apply(self.weight.abs(), self.a_open)
        self.logit_error = (slack(size) + logits_open).amax(0)
        classes = len(self.logits)
        labels = case.labels.cpu().long()
        self.valid = (labels >= 0) & (labels < classes)
        if case.ignore_index is not None:
            self.valid &= labels != case.ignore_index
        one_hot = F.one_hot(labels.masked_fill(~self.valid, 0), classes).permute(3, 0, 1, 2)
        self.one_hot = (one_hot * self.valid).double()
        self.log_p = self.logits.log_softmax(0)
        self.p = self.log_p.exp() * self.valid
        # Of a probability, relative; of its logarithm, but for the terms of that itself.
        self.error = 2 * self.logit_error + slack(torch.ones(()))
        self.class_weights = case.class_weights.cpu().double()[:, None, None, None]

    def sums(self):
        """(exact, allowed) of each of MEASURES."""
        space, everything = (1, 2, 3), (0, 1, 2, 3)
        losses = -self.log_p * self.class_weights
        of_losses = self.class_weights * (self.error + slack(self.log_p.abs()))
        for parts, errors, dim in (
            (self.p * self.one_hot, self.p * self.one_hot * self.error, space),
            (self.p, self.p * self.error, space),
            (losses * self.one_hot, of_losses * self.one_hot, everything),
            (losses * self.valid, of_losses * self.valid, everything),
        ):
            yield parts.sum(dim), slack_of_sum(parts, errors, dim)

    def gradients(self, grads):
        """(exact, allowed) of the gradients of features, weight and bias, by the kernel's formula."""
        of_intersection, of_probability = (g.cpu().double()[:, None, None, None] for g in grads[:2])
        of_nll, of_smooth = (g.cpu().double() for g in grads[2:])
        c = of_nll * (self.class_weights * self.one_hot).sum(0)
        smooth = of_smooth * self.class_weights

        def by_probability(sign):
            own = self.p * sign(self.one_hot * sign(of_intersection) + sign(of_probability))
            return own, self.p * (sign(c) + sign(smooth).sum(0) + sign(-own).sum(0))

        g = sum(by_probability(torch.positive)) - self.one_hot * c - self.valid * smooth
        size = sum(by_probability(torch.abs))
        error = size * 2 * self.error
        error += slack(size + self.one_hot * c.abs() + self.valid * smooth.abs())
        space = (1, 2, 3)
        of_bias = g.sum(space), slack_of_sum(g, error, space)
        if self.weight is None:
            return (g, error), (None, None), (None, None)
        narrow, g_open = stored(g, error, self.dtype)
        independent = error if self.dtype == torch.float32 else torch.zeros_like(error)
        across, w = self.weight.T, self.weight.T.abs()
        of_features = (
            apply(across, narrow),
            slack(apply(w, g.abs())) + apply(w, g_open) + apply(w.square(), independent.square()).sqrt(),
        )
        of_weight = (
            pairs(narrow, self.a),
            slack(pairs(g.abs(), self.a_size)) + pairs(g_open, self.a.abs()) + pairs(g.abs(), self.a_open)
            + pairs(independent.square(), self.a.square()).sqrt(),
        )  # fmt: skip
        return of_features, of_weight, of_bias


def apply(matrix, features):
    return torch.einsum("kc,cdhw->kdhw", matrix, features)


def pairs(left, right):
    return torch.einsum("kdhw,cdhw->kc", left, right)


def check(case: Case, config: Config) -> None:
    """Sums, gradients and labels of a case against float64."""
    exact = Exact(case)
    got = case.sums(config)
    for name, (want, allowed) in zip(MEASURES, exact.sums(), strict=True):
        ours = getattr(got, name)
        assert ours.dtype == torch.float64
        assert_rounded(ours, want, allowed, name)
    for name, ours, (want, allowed) in zip(
        ("features", "weight", "bias"), case.backward(config), exact.gradients(case.grads), strict=True
    ):
        if want is None or ours is None:
            assert ours is None
            assert want is None or (name == "bias" and case.bias is None)
        else:
            assert ours.dtype == (exact.dtype if name == "features" else torch.float32)
            assert_rounded(ours[0] if name == "features" else ours, want, allowed, name)
    labels = case.argmax(config).cpu().long()
    picked = exact.logits.gather(0, labels[None])[0]
    assert (exact.logits.amax(0) - picked <= 2 * exact.logit_error).all()


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("config", [CLASSES, TILE], ids=lambda config: config.loop)
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float32, "ignore_index": 255, "labels": torch.int32},
        {"dtype": torch.bfloat16, "channels": 16, "classes": 15, "labels": torch.uint8},
        {"dtype": torch.float16, "channels": 33, "classes": 17, "bias": False, "ignore_index": 0},
        {"channels": 1, "classes": 2, "ignore_index": -1, "labels": torch.int8, "size": (1, 1, 1)},
        {"channels": 3, "classes": 118, "labels": torch.int16, "size": (2, 7, 9)},
        {"dtype": torch.bfloat16, "channels": 48, "classes": 1, "size": (1, 11, 2)},
        {"weight": False, "classes": 6, "ignore_index": 5, "labels": torch.int8},
        {"weight": False, "classes": 150, "dtype": torch.bfloat16, "labels": torch.int16},
    ],
    ids=str,
)
def test_against_float64_torch(kernel_device, options, config):
    check(Case(kernel_device, **options), config)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("head_sums", lambda f: faults.before(f, 0, faults.border)),
        ("head_sums", lambda f: faults.before(f, 1, faults.one)),
        ("head_sums", lambda f: faults.result(f, faults.one, 3)),
        ("head_backward", lambda f: faults.before(f, 0, faults.border)),
        ("head_backward", lambda f: faults.before(f, 1, faults.one)),
        ("head_backward", lambda f: faults.after(f, 7, faults.border)),
        ("head_backward", lambda f: faults.after(f, 7, faults.row)),
        ("head_backward", lambda f: faults.result(f, faults.one, 0)),
    ],
)
def test_a_fault_is_seen(name, make, kernel_device, monkeypatch):
    monkeypatch.setitem(globals(), name, make(globals()[name]))
    with pytest.raises(AssertionError, match="elements wrong"):
        check(Case(kernel_device, channels=16, classes=4, size=(2, 3, 7)), TILE)


def test_equals_the_aten_head(kernel_device):
    """Ignored and unknown labels, class weights, the sums that label smoothing needs."""
    case = Case(kernel_device, ignore_index=2, classes=4, labels=torch.int16)
    weight = case.weight[..., None, None, None]
    aten = Head(
        case.features, weight, case.bias, kernel_device, case.class_weights, ignore_index=case.ignore_index
    )
    sums = Sums.zeros(1, 4, kernel_device)
    aten.add_sums(sums, 0, case.features, case.labels)
    got = case.sums()
    assert got.unknown == sums.unknown[0] > 0
    assert torch.equal(got.voxels, sums.voxels[0])
    for ours, want in zip(got, sums, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, want[0], rtol=1e-5, atol=1e-5)
    grads = Sums(
        case.grads[0][None], case.grads[1][None], sums.voxels, *(g[None] for g in case.grads[2:]), sums[5]
    )
    want = aten.pull(grads, 0, case.features, case.labels)
    out, grad_weight, grad_bias = case.backward()
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_weight, aten.grad_weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_bias, aten.grad_bias, rtol=1e-5, atol=1e-5)
    assert torch.equal(case.argmax().long(), aten.segment(case.features))


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.uint8, 255), (torch.int8, -128), (torch.int16, -1), (torch.int64, 2**32 + 1)]
)
def test_labels_of_any_type_do_not_wrap_around(kernel_device, dtype, value):
    case = Case(kernel_device, classes=150, channels=2, size=(1, 3, 4), labels=torch.int64)
    case.labels = (torch.arange(12).view(1, 3, 4) % 5).to(kernel_device, dtype)
    case.labels[0, 0, :2] = value
    got = case.sums()
    assert got.unknown == 2
    assert got.voxels.sum() == 10
    out, *_ = case.backward()
    assert (out[0, :, 0, 0, :2] == 0).all()
    case.ignore_index = value
    assert case.sums().unknown == 0


def test_rows_of_a_volume_and_strided_tensors(kernel_device):
    """Rows of a sample as views; channels-first features; labels in another order; rows of an output."""
    whole = Case(kernel_device, size=(7, 4, 3))
    part = Case(kernel_device, size=(7, 4, 3))
    batch = torch.cat([torch.full_like(whole.features, float("nan")), whole.features])
    batch = batch.contiguous(memory_format=torch.channels_last_3d)
    part.features = batch[1:, :, 2:5]
    part.labels = whole.labels[2:5]
    whole.features = whole.features[:, :, 2:5].contiguous()
    whole.labels = whole.labels[2:5].permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for ours, want in zip(part.sums(), whole.sums(), strict=True):
        assert torch.equal(ours, want)
    out = torch.full_like(batch, float("nan"))
    whole_out = torch.empty_like(whole.features, memory_format=torch.channels_last_3d)
    for ours, want in zip(part.backward(out=out[1:, :, 2:5]), whole.backward(out=whole_out), strict=True):
        assert torch.equal(ours, want)
    assert out.isnan().sum() == out.numel() - whole_out.numel()
    labels = torch.full((7, 4, 3), 99, dtype=torch.int16, device=kernel_device)
    head_argmax(part.features, part.weight, part.bias, labels[2:5], config=TILE)
    assert torch.equal(labels[2:5], whole.argmax(dtype=torch.int16))
    assert (labels[:2] == 99).all()
    assert (labels[5:] == 99).all()


@pytest.mark.parametrize("config", [CLASSES, TILE], ids=lambda config: config.loop)
def test_argmax_takes_the_lowest_of_equals(kernel_device, config):
    inf, nan = float("inf"), float("nan")
    rows = [
        [0, 1, 1],
        [2, 2, 2],
        [-inf, -inf, -inf],
        [0, nan, 1],
        [nan, nan, nan],
        [-inf, -1e38, -inf],
        [1, inf, inf],
    ]
    logits = torch.tensor(rows, device=kernel_device)
    out = torch.empty(1, 1, 7, dtype=torch.uint8, device=kernel_device)
    head_argmax(logits.t().reshape(1, 3, 1, 1, 7), None, None, out, config=config)
    assert torch.equal(out.flatten().long(), logits.argmax(1))


def test_close_logits_keep_their_order(kernel_device):
    """Neighbouring float32 numbers, as no scaled copy of them would."""
    low = torch.linspace(1, 2, 999, device=kernel_device)
    logits = torch.stack([low, torch.nextafter(low, low + 1)]).view(1, 2, 1, 1, 999)
    out = torch.empty(1, 1, 999, dtype=torch.uint8, device=kernel_device)
    head_argmax(logits, None, None, out, config=Config("tile", block_w=128, splits=2))
    assert (out == 1).all()


def test_logits_far_apart(kernel_device):
    """No overflow and no loss of -log p where p underflows."""
    case = Case(kernel_device, weight=False, classes=3, size=(1, 2, 8))
    case.features = case.features * 1000
    for name, (want, allowed) in zip(MEASURES, Exact(case).sums(), strict=True):
        assert_rounded(getattr(case.sums(), name), want, allowed, name)


@pytest.mark.parametrize("config", [CLASSES, TILE], ids=lambda config: config.loop)
def test_two_runs_give_the_same_bits_in_poisoned_memory(kernel_device, config, monkeypatch):
    """What is allocated is written in full: fresh memory full of NaN changes nothing."""
    case = Case(kernel_device, size=(3, 6, 9), ignore_index=1)
    first = (*case.sums(config), *case.backward(config))

    class Poisoned:
        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def empty(*shape, dtype, device):
            return torch.full(
                shape, float("nan") if dtype.is_floating_point else -(2**30), dtype=dtype, device=device
            )

    monkeypatch.setattr(head_module, "torch", Poisoned())
    for ours, want in zip((*case.sums(config), *case.backward(config)), first, strict=True):
        assert torch.equal(ours, want)


def test_gradients_only_where_they_are_asked_for(kernel_device):
    case = Case(kernel_device)
    out, grad_weight, grad_bias = case.backward()
    assert grad_weight.shape == (3, 5)
    assert grad_bias.shape == (3,)
    again, *none = case.backward(parameters=False)
    assert torch.equal(again, out)
    assert none == [None, None]


def test_sums_keep_their_digits(kernel_device):
    """Equal voxels are the worst case, all rounding errors alike: a plain float32 sum misses the bound."""
    tile, tiles = 16, 64
    config = Config("tile", block_w=tile, splits=1)
    logits = torch.tensor([0.3, 0.1, -0.7], device=kernel_device)

    def run(voxels):
        a = logits[None, :, None, None, None].expand(1, 3, 1, 1, voxels)
        labels = torch.full((1, 1, voxels), 1, dtype=torch.uint8, device=kernel_device)
        return head_sums(a, None, None, labels, torch.ones(3, device=kernel_device), None, config=config)

    many, one = run(tiles * tile), run(1)
    for ours, single in zip(many, one, strict=True):
        expected = single * tiles * tile
        assert ((ours - expected).abs() <= 5e-7 * expected.abs()).all()
    single = one.probability[0].item()
    plain = np.add.accumulate(np.full(tiles * tile, single, np.float32))[-1]
    assert abs(float(plain) / (single * tiles * tile) - 1) > 1e-6


def test_what_is_refused(kernel_device):
    case = Case(kernel_device)
    a, weight, bias, labels, class_weights, _ = case.arguments
    with pytest.raises(TypeError, match="float64"):
        head_sums(a.double(), weight, bias, labels, class_weights, None, config=TILE)
    with pytest.raises(ValueError, match="labels"):
        head_sums(a, weight, bias, labels[1:], class_weights, None, config=TILE)
    with pytest.raises(TypeError, match="labels"):
        head_sums(a, weight, bias, labels.float(), class_weights, None, config=TILE)
    with pytest.raises(ValueError, match="weight"):
        head_sums(a, weight[:, 1:], bias, labels, class_weights, None, config=TILE)
    with pytest.raises(ValueError, match="class_weights"):
        head_sums(a, weight, bias, labels, class_weights.double(), None, config=TILE)
    with pytest.raises(ValueError, match="channels last"):
        case.backward(out=torch.empty(a.shape, device=kernel_device))
    with pytest.raises(TypeError, match="int64"):
        case.argmax(dtype=torch.int64)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_shape_and_option(kernel_device, data):
    def draw(*values):
        return data.draw(st.sampled_from(values))

    weight = draw(True, True, False)
    options = {
        "channels": draw(1, 3, 5, 16, 17, 33, 48),
        "classes": draw(1, 2, 3, 15, 16, 17, 40),
        "size": tuple(data.draw(st.integers(1, 6)) for _ in range(3)),
        "dtype": draw(torch.float32, torch.bfloat16, torch.float16),
        "labels": draw(torch.int8, torch.int16, torch.int32, torch.int64),
        "ignore_index": draw(None, 0, 1, -1),
        "weight": weight,
        "bias": draw(True, False),
        "seed": data.draw(st.integers(0, 10**6)),
    }
    config = Config(draw("classes", "tile"), block_w=draw(16, 32, 64), splits=draw(1, 2, 3))
    check(Case(kernel_device, **options), config)
