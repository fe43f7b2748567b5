"""EffSegNet against the same network in stock torch, and the figures it is made for."""

import copy
import statistics

import pytest
import torch
from kept import bytes_kept_for_backward
from tolerances import EXACT, joined, moved_by_rounding, relative_error
from torch.nn.utils import parametrizations

import effseg
from effseg import EffSegNet, UNet3D
from effseg.errors import InputError
from effseg.models.levels import PRESETS
from effseg.models.stock import StockEffSegNet

ODD = (2, 1, 17, 47, 22)


def pair(preset="base", norm="instance", channels=1, classes=5, dtype=torch.float64, seed=0):
    """The network and its stock twin, with gamma and beta away from 1 and 0."""
    torch.manual_seed(seed)
    stock = StockEffSegNet(channels, classes, preset, norm).to(dtype)
    with torch.no_grad():
        for p in stock.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours = EffSegNet(channels, classes, preset, norm).to(dtype)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def batch(shape, classes=5, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(shape, dtype=dtype) + 0.5, torch.randint(
        0, classes, (shape[0], *shape[2:]), dtype=torch.uint8
    )


def gradients(model, image, labels, **options):
    model.zero_grad()
    loss = model.loss(image, labels, **options)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def assert_same_step(ours, stock, image, labels, **options):
    names = ["loss", *(name for name, _ in ours.named_parameters())]
    got, expected = (gradients(m, image, labels, **options) for m in (ours, stock))
    for a, b, name in zip(got, expected, names, strict=True):
        assert relative_error(a, b) <= EXACT, name


@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
def test_loss_and_gradients_on_odd_sizes(norm):
    ours, stock = pair(norm=norm)
    assert_same_step(ours, stock, *batch(ODD), class_weights=torch.rand(5).double() + 0.5)
    for a, b in zip(ours.buffers(), stock.buffers(), strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset(preset):
    ours, stock = pair(preset, channels=2)
    assert_same_step(ours, stock, *batch((1, 2, 17, 37, 20)))


@pytest.mark.diagonal
@pytest.mark.parametrize("memory", ["raw", "stream"])
@pytest.mark.parametrize("preset", ["base", pytest.param("tiny", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [{"auxiliary": True}, {"thick_axis": 0}, {"thick_axis": 1, "auxiliary": True}, {"thick_axis": 2}],
    ids=str,
)
def test_auxiliary_heads_and_thick_slices(preset, options, memory):
    torch.manual_seed(0)
    stock = StockEffSegNet(1, 5, preset, **options).double()
    ours = EffSegNet(1, 5, preset, memory=memory, **options).double()
    ours.load_state_dict(stock.state_dict())
    ours.slab_elements = 4000
    image, labels = batch((1, 1, 19, 41, 18))
    assert_same_step(ours, stock, image, labels)
    assert torch.equal(ours.segment(image), stock.segment(image))
    assert (ours.probabilities(image) - stock.probabilities(image)).abs().max() <= 2**-11


@pytest.mark.slow
@pytest.mark.usefixtures("small_preset")
def test_auto_chooses_by_the_budget_and_anew_for_another_size():
    torch.manual_seed(0)
    raw = EffSegNet(1, 5, "small").double().float()
    auto = EffSegNet(1, 5, "small", memory="auto", memory_budget="10MB")
    auto.load_state_dict(raw.state_dict())
    modes = []
    for size in (16, 40):
        image, labels = batch((1, 1, size, size, size), dtype=torch.float32)
        got, expected = (gradients(m, image, labels) for m in (auto, raw))
        assert relative_error(got[0], expected[0]) < 1e-5
        modes.append(auto.active_memory)
        assert (auto.segment(image) == raw.segment(image)).float().mean() > 0.999
    assert modes == ["raw", "stream"]


@pytest.mark.slow
def test_auto_refuses_what_does_not_fit():
    image, labels = batch((1, 1, 72, 72, 72), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"memory: training effseg-base on 1x1x72x72x72 .* the budget is"):
        EffSegNet(1, 5, memory="auto", memory_budget=30_000_000).loss(image, labels)


def test_auto_needs_a_budget_on_a_cpu():
    image, labels = batch((1, 1, 8, 8, 8), dtype=torch.float32)
    with pytest.raises(ValueError, match="memory_budget: memory='auto' on cpu needs one"):
        EffSegNet(1, 5, memory="auto").loss(image, labels)


@pytest.mark.parametrize("slab", [1, 5000, 10**9])
def test_slabs_of_any_thickness(slab):
    ours, stock = pair()
    ours.slab_elements = slab
    assert_same_step(ours, stock, *batch((1, 1, 21, 18, 39)))


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 7, 33), (40, 1, 2), (5, 64, 3)])
def test_any_size(size):
    ours, _ = pair()
    image, labels = batch((1, 1, *size))
    assert all(torch.isfinite(g).all() for g in gradients(ours, image, labels))
    assert ours(image).shape == (1, 5, *size)
    assert torch.equal(ours.segment(image).long(), ours(image).argmax(1))


@pytest.mark.parametrize("options", [{}, {"memory": "stream"}, {"recompute": 4}], ids=str)
def test_batch_norm_of_one_voxel_is_refused(options):
    """As torch and the 3D U-Net do: its running variance would be 0."""
    ours = EffSegNet(1, 5, norm="batch", **options)
    image, labels = torch.randn(1, 1, 32, 4, 8), torch.zeros(1, 32, 4, 8, dtype=torch.uint8)
    with pytest.raises(InputError, match="norm: expected more than one voxel per channel"):
        ours.loss(image, labels)
    assert torch.isfinite(ours.loss(image.expand(2, -1, -1, -1, -1), labels.expand(2, -1, -1, -1)))
    assert torch.isfinite(ours.eval().loss(image, labels))


@pytest.mark.parametrize("size", [(1, 1, 1), (32, 33, 64), (65, 7, 200)])
@pytest.mark.parametrize("thick_axis", [None, 1])
@pytest.mark.parametrize("preset", ["base", "tiny"])
def test_voxels_of_the_lowest_level(preset, thick_axis, size):
    with torch.device("meta"):
        model, image = StockEffSegNet(1, 5, preset, "batch", thick_axis=thick_axis), torch.empty(1, 1, *size)
        seen = []
        model.encoder[-1].enter.conv.register_forward_hook(lambda *args: seen.append(args[-1].shape[2:]))
        model.eval()(image)
    assert seen == [model.lowest_level(size)]


@pytest.mark.parametrize("preset", ["base", "tiny"])
def test_logits_and_segmentation(preset):
    ours, stock = pair(preset)
    image, _ = batch((2, 1, 20, 17, 36))
    logits = stock(image)
    assert relative_error(ours(image), logits) <= EXACT
    assert torch.equal(ours.segment(image).long(), logits.argmax(1))
    for model in (ours, stock):
        got = model.probabilities(image)
        assert got.dtype == torch.float16
        assert (got.double() - logits.softmax(1)).abs().max() <= 2**-11
    grad = torch.randn_like(logits)
    got, expected = (torch.autograd.grad(m(image), list(m.parameters()), grad) for m in (ours, stock))
    assert all(relative_error(a, b) <= EXACT for a, b in zip(got, expected, strict=True))


@pytest.mark.usefixtures("small_preset")
@pytest.mark.parametrize("memory", ["raw", "stream"])
@pytest.mark.parametrize("name", ["head", "auxiliary_heads.0", "decoder.0.lateral", "encoder.1.blocks.0"])
def test_hooks_on_what_is_not_called_are_refused(name, memory):
    """A pruned head would keep the weight that pruning found, whatever is trained or loaded afterwards."""
    image, labels = batch((2, 1, 16, 18, 40))
    model = EffSegNet(1, 5, "small", memory=memory, auxiliary=True).double()
    handle = model.get_submodule(name).register_forward_pre_hook(lambda *args: None)
    for call in (model, model.segment, lambda image: model.loss(image, labels)):
        with pytest.raises(ValueError, match=f"{name}: expected no hooks"):
            call(image)
    handle.remove()
    model.register_forward_hook(lambda _model, _inputs, output: output.argmax(1))
    assert model(image).shape == labels.shape


PARAMETRISED = {
    "encoder.0.enter.conv": {"memory": "stream"},
    "decoder.0.unit.conv": {"memory": "stream"},
    "decoder.0.lateral": {"memory": "raw"},
    "encoder.1.blocks.0.last.conv": {"memory": "stream", "recompute": 1},
    "encoder.5.blocks.1.unit.conv": {"memory": "stream", "recompute": 5},
    "head": {"memory": "stream"},
}


@pytest.mark.parametrize("name", PARAMETRISED)
def test_parametrised_weights_are_made_once_in_a_step(name):
    """Spectral norm's power iteration goes on each time: statistics would be those of another weight."""
    _, stock = pair()
    ours = EffSegNet(1, 5, **PARAMETRISED[name]).double()
    ours.load_state_dict(stock.state_dict())
    image, labels = batch((1, 1, 33, 34, 40))
    found = []
    for model in (ours, stock):
        layer = model.get_submodule(name)
        torch.manual_seed(1)
        parametrizations.spectral_norm(layer)
        loss = model.loss(image, labels)
        loss.backward()
        held = layer.parametrizations.weight
        found.append((loss.detach(), held.original.grad, held[0]._u))
    assert all(relative_error(a, b) <= EXACT for a, b in zip(*found, strict=True))


def test_evaluation_mode_uses_running_statistics():
    ours, stock = pair(norm="batch")
    image, labels = batch((2, 1, 16, 18, 40))
    ours.loss(image, labels), stock.loss(image, labels)
    ours.eval(), stock.eval()
    assert relative_error(ours(image), stock(image)) <= EXACT
    assert_same_step(ours, stock, image, labels)


def test_two_runs_give_the_same_bits():
    ours, _ = pair(dtype=torch.float32)
    image, labels = batch((1, 1, 40, 33, 36), dtype=torch.float32)
    runs = [gradients(ours, image, labels) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.usefixtures("small_preset")
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_step_in_low_precision(autocast):
    """All gradients of the network together.

    The sign of a value near the kink of a leaky ReLU is a matter of rounding, and one that flips costs two
    digits of the gradient, whoever rounds; so the median over several networks is compared.
    """
    errors = []
    for seed in range(3):
        ours, stock = pair("small", dtype=torch.float32, seed=seed)
        image, labels = batch((1, 1, 34, 16, 18), dtype=torch.float32)
        wide, wide_image = copy.deepcopy(stock).double(), image.double()

        def step(model, image, labels=labels):
            return joined(gradients(model, image, labels))

        exact = step(wide, wide_image)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = step(ours, image)
            torchs = step(stock, image) if autocast else None
        if not autocast:
            torchs = moved_by_rounding(lambda: step(wide, wide_image), seed)  # noqa: B023
        errors.append((relative_error(got, exact), relative_error(torchs, exact)))
    own, allowed = (statistics.median(e) for e in zip(*errors, strict=True))
    assert own <= 2 * allowed, f"ours {own:.2e}, allowed twice {allowed:.2e}"


def test_small_deepest_levels_train_in_bf16():
    """64 x 32 x 64 voxels leave 2 x 1 x 2 at the deepest level, where oneDNN's bf16 kernel is wrong."""
    ours, _ = pair(dtype=torch.float32)
    image, labels = batch((1, 1, 64, 32, 64), dtype=torch.float32)
    exact = gradients(ours, image, labels)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(ours, image, labels)
    for a, b, (name, _) in zip(got[1:], exact[1:], ours.named_parameters(), strict=True):
        assert torch.isfinite(a).all(), name
        assert float(a.norm()) < 3 * float(b.norm()) + 1e-3, name


@pytest.mark.parametrize("dtype", [torch.int16, torch.float16, torch.float64])
def test_images_are_taken_as_they_are(dtype):
    ours, _ = pair(dtype=torch.float32)
    image = torch.randint(-3, 4, (1, 1, 20, 24, 16)).to(dtype)
    labels = torch.randint(0, 5, (1, 20, 24, 16), dtype=torch.int32)
    expected = gradients(ours, image.float(), labels.to(torch.uint8))
    assert all(torch.equal(a, b) for a, b in zip(gradients(ours, image, labels), expected, strict=True))


@pytest.mark.parametrize(("autocast", "bar"), [(True, 110), (False, 215)], ids=["bf16", "fp32"])
def test_bytes_kept_for_backward(autocast, bar):
    """Every storage that autograd keeps, parameters aside, counted once, per voxel of a 64^3 volume."""
    model = EffSegNet(1, 15)
    image, labels = batch((1, 1, 64, 64, 64), 15, torch.float32)
    per_voxel = bytes_kept_for_backward(model, image, labels, autocast) / image.numel()
    assert 0.9 * bar < per_voxel <= bar


def test_parameters_against_the_baseline():
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert count(EffSegNet(1, 15)) <= 0.095 * count(UNet3D(1, 15))


@pytest.mark.parametrize("preset", PRESETS)
def test_save_and_load(tmp_path, preset):
    model = EffSegNet(2, 4, preset=preset, norm="group")
    model.save(tmp_path / "model.safetensors", extra={"labels": ["a", "b"]})
    loaded = effseg.load(tmp_path / "model.safetensors")
    assert loaded.arguments == model.arguments
    assert loaded.extra == {"labels": ["a", "b"]}
    image = torch.randn(1, 2, 16, 12, 20)
    assert torch.equal(loaded.eval()(image), model.eval()(image))


def test_bad_arguments_are_named():
    model = EffSegNet(1, 3)
    for call, message in [
        (lambda: EffSegNet(1, 3, preset="huge"), "preset: expected one of"),
        (lambda: EffSegNet(1, 3, norm="layer"), "norm: expected one of"),
        (lambda: EffSegNet(1, 3, memory="magic"), "memory: expected one of"),
        (lambda: EffSegNet(1, 3, thick_axis=3), "thick_axis: expected"),
        (lambda: EffSegNet(1, 3, recompute=-1), "recompute: expected"),
        (lambda: EffSegNet(1, 3, memory="auto", recompute=1), "recompute: expected 0, auto"),
        (lambda: EffSegNet(1, 3, memory_budget="2GB"), "memory_budget: expected None"),
        (lambda: EffSegNet(1, 1), "num_classes: expected"),
        (lambda: EffSegNet(0, 3), "in_channels: expected"),
        (lambda: model(torch.randn(1, 2, 8, 8, 8)), "image: expected"),
        (lambda: model(torch.randn(1, 8, 8, 8)), "image: expected"),
        (
            lambda: model.loss(torch.randn(1, 1, 8, 8, 8), torch.zeros(1, 8, 8, 9, dtype=torch.uint8)),
            "labels",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_many_classes_on_a_thin_level_warn():
    with pytest.warns(UserWarning, match="large-w32"):
        EffSegNet(1, 118)
