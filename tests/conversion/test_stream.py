"""`memory="stream"`: layers next to the image and to the loss are not stored, and nothing else changes."""

import copy
import io
import sys

import pytest
import torch
from convertible import NETWORKS, make
from torch import nn
from torch.utils.checkpoint import checkpoint

import effseg
import effseg.expressions.slabs
from effseg.benchmarking import networks
from effseg.conversion.lazy import LazyTensor
from effseg.conversion.stream_plan import last_convolutions
from effseg.losses import dice_cross_entropy

REFUSED = ("dynunet residual, deep",)  # MONAI stacks its heads
QUICK = ("plain deep", "residual", "basic group, interpolated", "segresnet batch, dropout 0")


@pytest.fixture(autouse=True)
def thin_slabs(monkeypatch):
    """Several slabs even of small volumes."""
    monkeypatch.setitem(effseg.expressions.slabs.THICK_SLAB_ELEMENTS, "cpu", 1)


class Small(nn.Module):
    """Layer from the image, layer, last layer (of a sum, if wanted), head."""

    def __init__(self, norm=nn.InstanceNorm3d, classes=3, bias=True, kernel=3, sums=False, channels=1):
        super().__init__()
        self.first, self.middle, self.last = (
            nn.Conv3d(i, o, k, padding=k // 2, bias=bias)
            for i, o, k in ((channels, 4, kernel), (4, 5, 3), (5, 4, kernel))
        )
        options = {"affine": True} if norm is nn.InstanceNorm3d else {}
        make_norm = (lambda c: nn.GroupNorm(1, c)) if norm is nn.GroupNorm else (lambda c: norm(c, **options))
        self.norms = nn.ModuleList(make_norm(c) for c in (4, 5, 4))
        self.act, self.head, self.sums = nn.LeakyReLU(0.01, inplace=True), nn.Conv3d(4, classes, 1), sums

    def forward(self, image):
        x = self.act(self.norms[0](self.first(image)))
        h = self.last(self.act(self.norms[1](self.middle(x))))
        return self.head(self.act(self.norms[2](h + x if self.sums else h)))


def small(size=(2, 1, 9, 5, 7), classes=3, **options):
    torch.manual_seed(0)
    network = Small(classes=classes, channels=size[1], **options).double()
    for parameter in network.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1, 0.2)
    labels = torch.randint(classes, (size[0], *size[2:]))
    return network, torch.randn(size, dtype=torch.float64), labels


def step(network, image, labels, loss=None):
    """Loss, gradients, buffers."""
    network.zero_grad()
    value = (loss or effseg.SegmentationLoss())(network(image), labels)
    value.backward()
    grads = {name: p.grad for name, p in network.named_parameters()}
    return value.detach(), grads, {name: b.clone() for name, b in network.named_buffers()}


def assert_same(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    whole = torch.stack([g.norm() for g in expected[1].values() if g is not None]).norm()
    for name, b in expected[1].items():
        a = found[1][name]
        if a is None or b is None:
            assert a is b or not (b if a is None else a).any(), name
        else:
            assert (a - b).norm() <= tolerance * (b.norm() + 1e-3 * whole), name
    for name, b in expected[2].items():
        torch.testing.assert_close(found[2][name], b, rtol=tolerance, atol=tolerance)


def assert_streams_as_plain(network, image, labels, loss=None, **options):
    converted = effseg.convert(copy.deepcopy(network), memory="stream", **options)
    assert_same(step(converted, image, labels, loss), step(network, image, labels, loss))
    return converted


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in NETWORKS if n not in REFUSED],
)
def test_a_step_in_float64(name):
    network, _ = make(name)
    size = (1, 1, 35, 33, 19) if name.startswith("basic") else (2, 1, 12, 20, 4)
    labels = torch.randint(3, (size[0], *size[2:]))
    converted = assert_streams_as_plain(network, torch.randn(size, dtype=torch.float64), labels)
    assert len(converted.effseg_settings.lasts) == 1


@pytest.mark.parametrize("size", [(1, 1, 1, 7, 5), (2, 1, 9, 5, 7), (1, 1, 6, 1, 3)])
@pytest.mark.parametrize(
    "options",
    [
        {"norm": nn.InstanceNorm3d},
        {"norm": nn.BatchNorm3d, "classes": 12},  # too many classes to collect sums in forward
        {"norm": nn.GroupNorm, "sums": True},
        {"norm": nn.InstanceNorm3d, "bias": False, "sums": True, "kernel": 1},
    ],
)
def test_any_size_norm_and_number_of_classes(size, options):
    assert_streams_as_plain(*small(size, **options))


def test_options_of_the_loss():
    network, image, labels = small(classes=4)
    labels[:, :2] = 9
    loss = effseg.SegmentationLoss(
        ignore_index=9, batch_dice=True, label_smoothing=0.1, class_weights=torch.tensor([1.0, 2, 3, 0.5])
    ).double()
    assert_streams_as_plain(network, image, labels, loss)


def test_nothing_of_the_streamed_layers_is_stored():
    network, image, labels = small((1, 1, 12, 6, 6))
    converted = effseg.convert(network, memory="stream")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        value = effseg.SegmentationLoss()(converted(image), labels)
    large = {
        t.untyped_storage()._cdata: t.shape[1] for t in kept if t.dim() == 5 and t.shape[2:] == (12, 6, 6)
    }
    assert sorted(large.values()) == [1, 5]  # the image, and the output of the layer in between
    value.backward()


def test_running_statistics_that_take_a_batchs_place():
    network, image, labels = small(norm=nn.BatchNorm3d)
    for norm in network.norms:
        norm.eval().running_mean.uniform_(-1, 1)
    assert_streams_as_plain(network, image, labels)


def test_buffers_change_once_with_or_without_a_loss():
    network, image, _ = small(norm=nn.BatchNorm3d)
    converted = effseg.convert(copy.deepcopy(network), memory="stream")
    network(image)
    converted(image)
    for a, b in zip(converted.buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_an_image_that_wants_a_gradient():
    network, image, labels = small(sums=True)
    grads = []
    for each in (effseg.convert(copy.deepcopy(network), memory="stream"), network):
        leaf = image.clone().requires_grad_()
        effseg.SegmentationLoss()(each(leaf), labels).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_frozen_layers():
    network, image, labels = small(sums=True)
    for frozen in (network.first, network.last, network.norms[2]):
        frozen.requires_grad_(False)
    assert_streams_as_plain(network, image, labels)


def test_a_second_backward_over_a_retained_graph():
    network, image, labels = small(sums=True)
    grads = []
    for each in (effseg.convert(copy.deepcopy(network), memory="stream"), network):
        value = effseg.SegmentationLoss()(each(image), labels)
        value.backward(retain_graph=True)
        value.backward()
        grads.append([p.grad for p in each.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def _softmax(logits, labels):
    return (logits.softmax(1)[:, 1] * labels).sum()


def _twice(logits, labels):
    return dice_cross_entropy(logits, labels) + 2 * dice_cross_entropy(logits, labels)


def _both(logits, labels):
    return dice_cross_entropy(logits, labels) + logits.square().mean()


def _both_after(logits, labels):
    return logits.square().mean() + dice_cross_entropy(logits, labels)


def _doubled(logits, labels):
    larger = nn.functional.interpolate(logits, scale_factor=2, mode="trilinear")
    return larger.square().mean() + labels.sum() * 0


@pytest.mark.parametrize("loss", [_softmax, _twice, _both, _both_after, _doubled])
@pytest.mark.parametrize("sums", [False, True])
def test_other_uses_of_logits(loss, sums):
    assert_streams_as_plain(*small(sums=sums), loss)


def test_logits_are_made_once():
    network, image, _ = small()
    logits = effseg.convert(network, memory="stream")(image)
    assert isinstance(logits, LazyTensor)
    assert logits.materialise() is logits.materialise()


def test_logits_of_the_parameters_that_they_were_made_of():
    network, image, _ = small(norm=nn.BatchNorm3d)
    expected = network(image)
    converted = effseg.convert(copy.deepcopy(network), memory="stream")
    logits = converted(image)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(1)
    torch.testing.assert_close(logits.detach(), expected.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("where", ["first", "last", "norms.2", "act", "head", "norms.0"])
def test_real_tensors_where_hooks_are(where):
    network, image, labels = small()
    network.act.inplace = False  # torch refuses it behind a backward hook
    converted = effseg.convert(copy.deepcopy(network), memory="stream")
    seen = {}
    for each in (converted, network):
        seen[each] = []

        def look(module, inputs, output, notes=seen[each]):
            assert type(output) is torch.Tensor
            notes.append(output.detach().clone())

        def look_back(module, grads, outputs, notes=seen[each]):
            notes.append(outputs[0].clone())

        module = each.get_submodule(where)
        module.register_forward_hook(look)
        if where != "first":  # whose input wants no gradient
            module.register_full_backward_hook(look_back)
    assert_same(step(converted, image, labels), step(network, image, labels))
    torch.testing.assert_close(seen[converted], seen[network], rtol=1e-9, atol=1e-12)


def test_a_hook_that_comes_too_late_says_so():
    class Late(Small):
        def forward(self, image):
            h = self.last(self.act(self.norms[1](self.middle(self.act(self.norms[0](self.first(image)))))))
            normed = self.norms[2](h)
            if torch.is_grad_enabled():
                h.register_hook(lambda grad: 2 * grad)
            return self.head(self.act(normed))

    with pytest.raises(RuntimeError, match=r"register_hook: expected before other operators"):
        effseg.convert(Late(), memory="stream")(torch.randn(1, 1, 4, 4, 4))


def test_without_a_gradient():
    network, image, labels = small(norm=nn.BatchNorm3d, sums=True)
    converted = effseg.convert(copy.deepcopy(network), memory="stream")
    with torch.no_grad():
        torch.testing.assert_close(converted(image), network(image), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(converted.eval()(image), network.eval()(image), rtol=1e-9, atol=1e-12)
    assert_same(step(converted, image, labels), step(network, image, labels))  # evaluation mode, gradients


def test_a_region_without_a_gradient():
    class Cut(Small):
        def forward(self, image):
            with torch.no_grad():
                x = self.first(image)
            x = self.act(self.norms[0](x))
            with torch.no_grad():
                h = self.last(self.act(self.norms[1](self.middle(x))))
            return self.head(self.act(self.norms[2](h)))

    torch.manual_seed(0)
    assert_streams_as_plain(Cut().double(), *small()[1:])


def test_inside_a_checkpoint():
    network, image, labels = small(norm=nn.BatchNorm3d)
    converted = effseg.convert(copy.deepcopy(network), memory="stream")
    expected = step(network, image, labels)
    again = lambda x: checkpoint(converted, x, use_reentrant=False)  # noqa: E731
    value = effseg.SegmentationLoss()(again(image), labels)
    value.backward()
    grads = {name: p.grad for name, p in converted.named_parameters()}
    assert_same((value.detach(), grads, {}), (*expected[:2], {}))


def test_autocast():
    network, image, labels = small((1, 1, 24, 16, 16), classes=2)
    network, image = network.float(), image.float()
    converted = effseg.convert(copy.deepcopy(network), memory="stream")
    raw = effseg.convert(copy.deepcopy(network))

    def under_autocast(each):
        def loss(logits, labels):
            assert logits.dtype == torch.bfloat16
            return dice_cross_entropy(logits, labels)

        with torch.autocast("cpu", torch.bfloat16):
            return step(each, image, labels, loss)

    assert_same(under_autocast(converted), under_autocast(raw), 0.02)  # bfloat16 has three digits


def test_copies_and_files():
    network, image, labels = small()
    converted = effseg.convert(network, memory="stream")
    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    expected = step(network, image, labels)
    for each in (copy.deepcopy(converted), torch.load(file, weights_only=False)):
        assert each.effseg_settings == converted.effseg_settings
        assert_same(step(each, image, labels), expected)


class Two(Small):
    """Two heads on one layer."""

    def forward(self, image):
        x = self.act(self.norms[0](self.first(image)))
        return self.head(x), self.head(x)


class Parametrised(Small):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.spectral_norm(self.last)


@pytest.mark.parametrize(
    ("network", "got"),
    [
        (lambda: nn.Sequential(Small(), nn.Softmax(1)), "a tensor made by another operator"),
        (Two, "a layer that others read, a 1x1x1 convolution of a layer that others read"),
        (Parametrised, "a layer whose weight is none of its parameters"),
        (lambda: nn.Sequential(Small(), nn.Conv3d(3, 3, 1)), "a 1x1x1 convolution of what is no such layer"),
    ],
)
def test_a_network_that_cannot_says_what_it_lacks(network, got):
    model = network()
    with pytest.raises(effseg.InputError, match=rf'memory: "stream" expects logits .* returns .*{got}'):
        effseg.convert(model, memory="stream")
    converted = effseg.convert(model, memory="auto", memory_budget="1GB")
    assert not converted.effseg_settings.lasts


def test_arguments_that_do_not_fit():
    with pytest.raises(effseg.InputError, match="lazy_logits: expected True"):
        effseg.convert(Small(), memory="stream", lazy_logits=False)
    with pytest.raises(
        effseg.InputError, match=r'"stream" expects a network that can be examined, got Small'
    ):
        effseg.convert(Small(), memory="stream", shape=(1, 3, 4, 4, 4))


def test_auto_takes_it_where_block_does_not_fit(monkeypatch):
    network, image, labels = small()
    network, image, peaks = network.float(), image.float(), {}

    def predicted_once(model, *arguments, **options):
        memory = model.effseg_settings.memory
        peaks[memory] = peaks.get(memory) or effseg.peak_training_memory(model, *arguments, **options)
        return peaks[memory]

    monkeypatch.setattr(sys.modules["effseg.conversion.convert"], "peak_training_memory", predicted_once)
    converted = effseg.convert(network, memory="auto", memory_budget=1)
    with pytest.raises(effseg.InputError, match=r"\(raw\), .* \(block\), .* \(stream\), the budget is"):
        converted(image)
    assert peaks["stream"].reserved < min(peaks["raw"].reserved, peaks["block"].reserved)
    assert peaks["raw"].macs <= peaks["block"].macs <= peaks["stream"].macs
    converted = effseg.convert(network, memory="auto", memory_budget=peaks["stream"].reserved)
    effseg.SegmentationLoss()(converted(image), labels).backward()
    assert list(converted.effseg_choices.values()) == ["stream"]


def test_report():
    network, _, _ = small()
    report = effseg.convert(network, memory="stream", shape=(1, 1, 16, 16, 16)).conversion_report
    assert report.lasts == ("last.weight",)
    assert str(report).splitlines()[-1] == "  made by the loss: last.weight"
    channels = 5  # of what is stored between the layers, in float64
    assert 8 * channels <= report.after.kept < 8 * (channels + 1)
    assert effseg.convert(network).conversion_report.lasts is None


def test_the_trial_leaves_the_network_as_it_is():
    network, _, _ = small(norm=nn.BatchNorm3d)
    before = copy.deepcopy(network.state_dict())
    report = effseg.convert(network).conversion_report
    assert last_convolutions(network, report, True) == {"last.weight"}
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "bar"),
    [
        ("plain_conv_unet", 0.25),
        ("residual_encoder_unet", 0.25),
        ("dynunet", 0.25),
        ("basic_unet", 0.25),
        ("segresnet", 0.12),
    ],
)
def test_predicted_peak_of_a_step(network, bar, monkeypatch):
    monkeypatch.undo()
    own = network.endswith("conv_unet") or network.startswith("residual")
    pytest.importorskip("dynamic_network_architectures" if own else "monai")
    make, shape = getattr(networks, network), (1, 1, 512, 512, 256)
    stock = effseg.peak_training_memory(make(15), shape).peak
    assert effseg.peak_training_memory(effseg.convert(make(15), memory="stream"), shape).peak <= bar * stock
