"""memory="stream" against memory="raw" and against stock torch: the same numbers."""

import copy
import pickle
import statistics
import warnings

import pytest
import torch
from streamed import ODD, PAIR, SMALL, batch, network, rows
from tolerances import EXACT, joined, moved_by_rounding, relative_error

import effseg
from effseg.models.stock import StockEffSegNet
from effseg.operators.norm_sums import NormSums

pytestmark = pytest.mark.usefixtures("few_levels")


@pytest.fixture
def poison():
    """Fresh memory is NaN, so an element that no operator writes is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def trio(preset="few", norm="instance", channels=1, classes=5, dtype=torch.float64, seed=0):
    """Streamed, raw and stock network of the same weights, gamma and beta away from 1 and 0."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ classes are read from")
        stock = StockEffSegNet(channels, classes, preset, norm).to(dtype)
    with torch.no_grad():
        for p in stock.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours = [network(memory, channels, classes, preset, norm).to(dtype) for memory in ("stream", "raw")]
    for model in ours:
        model.load_state_dict(stock.state_dict())
    return *ours, stock


def step(model, image, labels, **options):
    """Loss and gradients by name; None where a parameter got no gradient."""
    model.zero_grad()
    loss = model.loss(image, labels, **options)
    loss.backward()
    return {"loss": loss.detach()} | {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }


def assert_same(got, expected):
    for name, value in expected.items():
        assert (got[name] is None) == (value is None), name
        if value is not None:
            error = relative_error(got[name], value)
            assert error <= EXACT, f"{name}: {error:.1e}"


def assert_same_step(stream, others, image, labels, **options):
    """Loss, gradients and running statistics. (That raw equals stock is test_effsegnet.py's.)"""
    got = step(stream, image, labels, **options)
    for other in others:
        assert_same(got, step(other, image, labels, **options))
        assert_same(dict(stream.named_buffers()), dict(other.named_buffers()))


# ---------------------------------------------------------------- the same numbers
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
def test_every_norm_on_odd_sizes(norm, mode, poison):
    stream, _, stock = trio(norm=norm)
    image, labels = batch(ODD)
    if mode == "eval":
        for model in (stream, stock):
            model.loss(image, labels)  # running statistics that are no longer 0 and 1
            model.eval()
    assert_same_step(stream, (stock,), image, labels, class_weights=torch.rand(5).double() + 0.5)


@pytest.mark.parametrize("thickness", [0, 1, 5, 20, 67, 1000])
def test_slabs_that_divide_the_axis_and_that_do_not(thickness, poison):
    """From a slab_elements below one row (one row is taken) to more rows than there are."""
    stream, _, stock = trio()
    stream.slab_elements = rows(thickness, SMALL) or 1
    assert_same_step(stream, (stock,), *batch(SMALL))


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("levels", [1, 2, 4, 9])
def test_recomputed_levels(levels, norm):
    """More levels than there are blocks is all of them."""
    stream, _, stock = trio(norm=norm)
    stream.recompute_levels = levels
    assert_same_step(stream, (stock,), *batch(PAIR))


@pytest.mark.parametrize("levels", [0, 1, 4])
def test_a_step_updates_running_statistics_once(levels):
    stream, _, stock = trio(norm="batch")
    stream.recompute_levels = levels
    for i in (1, 2):
        assert_same_step(stream, (stock,), *batch(PAIR))
        counts = {int(b) for name, b in stream.named_buffers() if name.endswith("num_batches_tracked")}
        assert counts == {i}


@pytest.mark.parametrize(("classes", "collected"), [(2, True), (36, True), (37, False), (45, False)])
def test_normalisation_sums_collected_and_swept(classes, collected):
    stream, _, stock = trio(classes=classes)
    assert NormSums.pays(stream.decoder[0].unit.conv.weight, classes) == collected
    stream.slab_elements = rows(5, SMALL)
    options = {"class_weights": torch.rand(classes).double() + 0.5, "label_smoothing": 0.1}
    assert_same_step(stream, (stock,), *batch(SMALL, classes), **options)


@pytest.mark.parametrize("preset", ["base", "large", "large-w32"])
def test_presets_and_several_channels(preset):
    stream, _, stock = trio(preset, channels=2)
    stream.recompute_levels = 1
    assert_same_step(stream, (stock,), *batch((1, 2, 67, 7, 6)))


def test_tiny_has_nothing_to_stream():
    stream, raw, _ = trio("tiny")
    image, labels = batch((1, 1, 17, 34, 11))
    got, expected = (step(m, image, labels) for m in (stream, raw))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.diagonal
@pytest.mark.parametrize("collected", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"class_weights": torch.tensor([0.2, 1.0, 3.0, 0.0, 0.7]).double()},
        {"ignore_index": 255},
        {"ignore_index": 0},
        {"label_smoothing": 0.2},
        {"batch_dice": True},
        {"include_background": True, "dice_weight": 0.3, "ce_weight": 2.0, "smooth": 0.1},
        {
            "class_weights": torch.tensor([0.2, 1.0, 3.0, 0.0, 0.7]).double(),
            "ignore_index": 255,
            "label_smoothing": 0.1,
            "batch_dice": True,
        },
        {"dice_weight": 0.0},
        {"ce_weight": 0.0},
    ],
    ids=lambda options: "+".join(options),
)
def test_options_of_the_loss(options, collected, monkeypatch):
    monkeypatch.setattr(NormSums, "pays", staticmethod(lambda weight, classes: collected))
    stream, _, stock = trio()
    image, labels = batch(PAIR)
    if options.get("ignore_index") == 255:
        labels[torch.rand(labels.shape) < 0.3] = 255
    stream.slab_elements = rows(8, image.shape)
    assert_same_step(stream, (stock,), image, labels, **options)


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 7, 33), (40, 1, 2), (5, 64, 3)])
@pytest.mark.parametrize("levels", [0, 4])
def test_any_size(size, levels):
    """Gradients taken together: normalised over a single voxel, many are zero but for rounding."""
    stream, raw, _ = trio()
    stream.recompute_levels = levels
    image, labels = batch((1, 1, *size))
    got, expected = (step(m, image, labels) for m in (stream, raw))
    flat = [torch.cat([g.flatten() for g in grads.values()]) for grads in (got, expected)]
    assert relative_error(*flat) <= EXACT
    assert torch.equal(stream.segment(image), raw.segment(image))
    assert (stream.probabilities(image) - raw.probabilities(image)).abs().max() <= 2**-11


@pytest.mark.parametrize(
    ("frozen", "norm"),
    [
        *(
            (part, "instance")
            for part in ("encoder", "head", "decoder.0.unit", "encoder.0", "decoder", "conv")
        ),
        *(("norm", norm) for norm in ("instance", "batch", "group")),
    ],
)
def test_frozen_parameters(frozen, norm):
    models = trio(norm=norm)
    models[0].recompute_levels = 1
    for model in models:
        for name, p in model.named_parameters():
            p.requires_grad_(not (name.startswith(frozen) or f".{frozen}." in name))
    assert_same_step(models[0], models[2:], *batch(SMALL))
    assert any(p.grad is None for p in models[0].parameters())
    assert any(p.grad is not None for p in models[0].parameters())


def test_gradients_scale_add_up_and_may_be_taken_twice():
    """What a loss scaler, accumulation over batches and retain_graph do."""
    stream, raw, _ = trio()
    image, labels = batch(SMALL)
    other = image.flip(2)
    once = step(stream, image, labels)
    both = {name: once[name] + value for name, value in step(raw, other, labels).items()}

    stream.zero_grad()
    (3 * (stream.loss(image, labels) + stream.loss(other, labels))).backward()
    assert_same({name: p.grad / 3 for name, p in stream.named_parameters()} | {"loss": both["loss"]}, both)

    stream.zero_grad()
    loss = stream.loss(image, labels)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same({name: p.grad / 2 for name, p in stream.named_parameters()} | {"loss": loss}, once)


def test_two_runs_give_the_same_bits():
    stream, *_ = trio(dtype=torch.float32)
    stream.recompute_levels, stream.slab_elements = 1, rows(5, (1, 1, 40, 33, 36))
    image, labels = batch((1, 1, 40, 33, 36), dtype=torch.float32)
    one, two = (step(stream, image, labels) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.int16, torch.float16, torch.float64])
def test_images_and_labels_are_taken_as_they_are(dtype):
    stream, *_ = trio(dtype=torch.float32)
    image = torch.randint(-3, 4, (1, 1, 20, 24, 16)).to(dtype)
    labels = torch.randint(0, 5, (1, 1, 20, 24, 16), dtype=torch.int32)
    got, expected = step(stream, image, labels), step(stream, image.float(), labels[:, 0].to(torch.uint8))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_of_any_layout(channels_last):
    stream, raw, _ = trio(channels=2)
    image, labels = batch((2, 2, 67, 7, 6))
    other = image.transpose(2, 4).contiguous().transpose(2, 4)
    if channels_last:
        other = image.contiguous(memory_format=torch.channels_last_3d)
    assert not other.is_contiguous()
    assert_same(step(stream, other, labels), step(raw, image, labels))


def test_labels_that_are_no_class_are_refused():
    stream, *_ = trio()
    image, labels = batch((1, 1, 33, 8, 8))
    labels[0, 32, 7, 7] = 5
    with pytest.raises(ValueError, match="labels: expected 0 to 4 or ignore_index, 1 voxels"):
        stream.loss(image, labels)
    with pytest.raises(ValueError, match="labels: expected"):
        stream.loss(image, labels[:, 1:])
    with pytest.raises(ValueError, match="class_weights: expected"):
        stream.loss(image, labels.clamp(max=4), class_weights=torch.ones(4))


# ---------------------------------------------------------------- segmentation, copies
@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
def test_segmentation(norm):
    """With the batch's statistics, which batch norm tracks as torch's does, and with running ones."""
    models = trio(norm=norm)
    image, labels = batch(ODD)
    models[0].slab_elements = rows(4, ODD)
    for training in (True, False):
        for model in models:
            model.loss(image, labels)
            model.train(training)
        stream, raw, stock = (model.segment(image) for model in models)
        assert stream.dtype == torch.uint8
        assert torch.equal(stream, raw)
        assert torch.equal(stream, stock)
        for model in models[1:]:
            assert_same(dict(models[0].named_buffers()), dict(model.named_buffers()))
    assert relative_error(models[0](image), models[2](image)) <= EXACT


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_stream_as_well(how, tmp_path):
    stream, *_ = trio(dtype=torch.float32)
    stream.recompute_levels, stream.slab_elements = 2, 40_000
    image, labels = batch(SMALL, dtype=torch.float32)
    expected = step(stream, image, labels)
    if how == "deepcopy":
        copied = copy.deepcopy(stream)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(stream))
    else:
        stream.save(tmp_path / "model.safetensors")
        copied = effseg.load(tmp_path / "model.safetensors").train()
        copied.recompute_levels, copied.slab_elements = 2, 40_000
    assert copied.arguments == stream.arguments
    assert (copied.recompute_levels, copied.slab_elements) == (2, 40_000)
    got = step(copied, image, labels)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


# ---------------------------------------------------------------- low precision
@pytest.mark.parametrize(
    ("autocast", "levels", "classes"),
    [(False, 0, 5), (True, 0, 5), (True, 1, 40)],
    ids=["fp32", "bf16", "bf16-recomputed-swept"],
)
def test_step_in_low_precision(autocast, levels, classes):
    """All gradients together, in the median over several networks: a sign that flips at a leaky ReLU's kink
    costs two digits, whoever rounds."""
    errors = []
    for seed in range(3):
        stream, _, stock = trio(classes=classes, dtype=torch.float32, seed=seed)
        stream.recompute_levels = levels
        image, labels = batch((1, 1, 34, 16, 18), classes, torch.float32)
        wide, wide_image = copy.deepcopy(stock).double(), image.double()

        def joined_step(model, image, labels=labels):
            return joined(step(model, image, labels))

        exact = joined_step(wide, wide_image)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = joined_step(stream, image)
            torchs = joined_step(stock, image) if autocast else None
        if not autocast:
            torchs = moved_by_rounding(lambda: joined_step(wide, wide_image), seed)  # noqa: B023
        errors.append((relative_error(got, exact), relative_error(torchs, exact)))
    own, allowed = (statistics.median(e) for e in zip(*errors, strict=True))
    assert own <= 2 * allowed, f"ours {own:.2e}, allowed twice {allowed:.2e}"
