"""A converted network is used as the original is."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from convertible import A_FEW, listed, make
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import effseg
from effseg import InputError
from effseg.conversion import LazyTensor


def assert_same_outputs(first, second, image):
    for a, b in zip(listed(first(image)), listed(second(image)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", A_FEW)
def test_weights_go_both_ways(name):
    network, image = make(name)
    converted = effseg.convert(copy.deepcopy(network))
    state = network.state_dict()
    assert list(converted.state_dict()) == list(state)
    assert all(
        torch.equal(a, b) for a, b in zip(state.values(), converted.state_dict().values(), strict=True)
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.5)
    converted.load_state_dict(network.state_dict(), strict=True)
    assert_same_outputs(converted, network, image)
    fresh, _ = make(name)
    fresh.load_state_dict(converted.state_dict(), strict=True)
    assert_same_outputs(fresh, network, image)


def test_the_original_is_left_and_shares_its_weights():
    network, image = make("residual")
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    converted = effseg.convert(network)
    assert type(network).__name__ == "ResidualEncoderUNet"
    assert isinstance(converted, type(network))
    assert type(network(image)) is torch.Tensor
    converted(image).square().mean().backward()
    before = converted(image).detach()
    optimizer.step()
    assert not torch.allclose(converted(image), before)
    assert_same_outputs(converted, network, image)


def test_buffers_stay_shared_after_to():
    network, _ = make("plain batch")
    converted = effseg.convert(network).to(torch.float32)
    assert {t.dtype for t in network.buffers()} == {torch.float32, torch.int64}
    assert all(a is b for a, b in zip(converted.buffers(), network.buffers(), strict=True))
    assert all(a is b for a, b in zip(converted.parameters(), network.parameters(), strict=True))


def test_restoring():
    network, image = make("plain deep")
    restored = effseg.restore(effseg.convert(network, memory="block"))
    assert {type(m) for m in restored.modules()} == {type(m) for m in network.modules()}
    assert vars(restored).keys() == vars(network).keys()
    assert all(a is b for a, b in zip(restored.parameters(), network.parameters(), strict=True))
    assert_same_outputs(restored, network, image)


def test_converting_twice_takes_the_latest_settings():
    network, image = make("plain")
    twice = effseg.convert(effseg.convert(network), memory="block")
    assert twice.effseg_settings.memory == "block"
    assert_same_outputs(twice, network, image)


@pytest.mark.parametrize("memory", ["raw", "block"])
def test_copies_and_files(memory, tmp_path):
    network, image = make("plain deep")
    converted = effseg.convert(network, memory=memory)
    copied = copy.deepcopy(converted)
    assert all(a is not b for a, b in zip(copied.parameters(), network.parameters(), strict=True))
    buffer = io.BytesIO()
    torch.save(converted, buffer)
    buffer.seek(0)
    again = [copied, pickle.loads(pickle.dumps(converted)), torch.load(buffer, weights_only=False)]
    for each in again:
        assert each.effseg_settings == converted.effseg_settings
        assert type(each) is type(converted)
        assert_same_outputs(each, network, image)
    torch.save(converted.state_dict(), tmp_path / "weights.pt")
    network.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    network, image = make("basic")
    safetensors.save_model(effseg.convert(network), tmp_path / "weights.safetensors")
    other, _ = make("basic")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    converted = effseg.convert(other)
    safetensors.load_model(converted, tmp_path / "weights.safetensors")
    assert_same_outputs(converted, network, image)


def test_averaged_weights():
    network, image = make("segresnet")
    converted = effseg.convert(network)
    averaged = AveragedModel(converted)
    averaged.update_parameters(converted)
    assert_same_outputs(averaged, network, image)


def test_after_a_step_of_a_network_that_remembers_outputs():
    network, image = make("dynunet residual, deep")
    network(image).sum().backward()
    converted = effseg.convert(network)
    assert_same_outputs(converted, network, image)
    assert_same_outputs(effseg.restore(converted), network, image)


def test_in_one_process_of_ddp(tmp_path):
    network, image = make("plain deep")
    labels = torch.randint(3, (2, 16, 20, 24))
    criterion = effseg.SegmentationLoss()
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(effseg.convert(copy.deepcopy(network)))
        for _ in range(2):  # the second raises where a head got no gradient
            parallel.zero_grad()
            criterion(parallel(image), labels).backward()
        copying = DistributedDataParallel(effseg.convert(copy.deepcopy(network)), static_graph=True)
        with pytest.raises(RuntimeError, match="lazy_logits=False"):
            criterion(copying(image), labels)
    finally:
        dist.destroy_process_group()
    criterion(network(image), labels).backward()
    for a, b in zip(parallel.parameters(), network.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-9 * b.grad.norm() + 1e-12


def test_compiled():
    """The network runs as it is, inside a caller that is compiled."""
    network, image = make("plain")
    compiled = torch.compile(effseg.convert(network), backend="aot_eager")
    assert_same_outputs(compiled, network, image)
    compiled(image).square().mean().backward()
    assert all(p.grad is not None for p in network.decoder.seg_layers[-1].parameters())


def test_hooks_of_modules_are_called():
    network, image = make("plain")
    converted, seen = effseg.convert(network), []
    converted.encoder.stages[1].register_forward_hook(lambda _module, _args, output: seen.append(output))
    converted(image)
    assert isinstance(seen[0], torch.Tensor)
    assert seen[0].shape == (2, 8, 8, 10, 12)
    stages = network.encoder.stages
    torch.testing.assert_close(seen[0] * 1, stages[1](stages[0](image)))


class Twice(nn.Module):
    """Something nobody knows: two inputs, a dictionary out, an operator without a rule."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv3d(1, 4, 3, padding="same"), nn.InstanceNorm3d(4), nn.PReLU())
        self.dilated = nn.Conv3d(8, 4, 3, padding=2, dilation=2)
        self.head = nn.Conv3d(4, 2, 1)

    def forward(self, image, other, scale=1.0):
        both = torch.cat((self.first(image), self.second(other)), dim=1)
        return {"logits": self.head(torch.sigmoid(self.dilated(both)) * scale), "mean": both.mean()}


def test_a_network_nobody_knows():
    torch.manual_seed(0)
    network = Twice().double()
    images = [torch.randn(1, 1, 5, 7, 6, dtype=torch.float64) for _ in range(2)]
    converted = effseg.convert(copy.deepcopy(network), strict=False)
    found = []
    for each in (converted, network):
        out = each(images[0], other=images[1], scale=2.0)
        (out["logits"].square().mean() + out["mean"]).backward()
        found.append([out["mean"].detach(), *(p.grad for p in each.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert "could not be examined" in str(converted.conversion_report)


def test_our_baseline_is_one_of_them():
    torch.manual_seed(0)
    network = effseg.UNet3D(1, 3)
    image, labels = torch.randn(1, 1, 16, 16, 16), torch.randint(3, (1, 16, 16, 16))
    converted = effseg.convert(copy.deepcopy(network))
    torch.testing.assert_close(converted.loss(image, labels), network.loss(image, labels))
    assert not converted.conversion_report.left


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": 3}, TypeError, "model: expected an nn.Module, got int"),
        ({"memory": "full"}, InputError, "memory: expected one of raw, block, stream, auto, got 'full'"),
        ({"memory_budget": "8GB"}, InputError, "memory_budget: expected None with memory='raw'"),
        (
            {"model": nn.Linear(3, 3)},
            InputError,
            "model: expected convolutions followed by norms, got Linear",
        ),
        ({"model": nn.Conv3d(1, 2, 3)}, InputError, "expected convolutions followed by norms, got Conv3d"),
        ({"model": nn.DataParallel(nn.Conv3d(1, 2, 3))}, TypeError, "wrapped afterwards, got DataParallel"),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = {"model": make("plain")[0], "memory": "raw"} | change
    with pytest.raises(error, match=message):
        effseg.convert(**arguments)


def test_nothing_to_take_over_may_be_wanted():
    network = effseg.convert(nn.Sequential(nn.Conv3d(1, 2, 3)), strict=False)
    assert network(torch.zeros(1, 1, 3, 3, 3)).shape == (1, 2, 1, 1, 1)


def test_lazy_logits_are_tensors():
    network, image = make("plain")
    converted = effseg.convert(network)
    logits = converted(image)
    assert isinstance(logits, LazyTensor)
    assert isinstance(logits, torch.Tensor)
    assert (logits.shape, logits.dtype, logits.device, logits.ndim) == (
        (2, 3, 16, 20, 24),
        image.dtype,
        image.device,
        5,
    )
    assert logits.requires_grad
    assert logits.has_head
    assert type(logits.detach()) is not torch.nn.Parameter
    torch.testing.assert_close(logits, network(image))
    assert "tensor(" in repr(logits)
    assert type(effseg.convert(network, lazy_logits=False)(image)) is torch.Tensor
    with torch.no_grad():
        assert type(converted(image)) is torch.Tensor


def test_code_that_asks_no_function_protocol_finds_values_and_gradients():
    network, image = make("plain")
    converted = effseg.convert(network)
    with torch._C.DisableTorchFunctionSubclass():
        values = torch.exp(converted(image))
        values.sum().backward()
    expected = torch.exp(network(image))
    torch.testing.assert_close(values, expected)
    found = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    expected.sum().backward()
    assert found
    for ours, theirs in zip(found, (p.grad for p in network.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_no_gradient_is_lost_in_a_function_of_ones_own():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.InstanceNorm3d(2), nn.ReLU())

        def forward(self, x):
            return Doubled.apply(self.body(x))

    network, image = Network().double(), torch.randn(1, 1, 4, 4, 4, dtype=torch.float64)
    weights, grads = torch.randn(1, 2, 4, 4, 4, dtype=torch.float64), []
    for each in (network, effseg.convert(network)):
        network.zero_grad()
        (each(image) * weights).sum().backward()
        grads.append(network.body[0].weight.grad.clone())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-9)


def second_derivative(network, image):
    image = image.requires_grad_()
    (grad,) = torch.autograd.grad(network(image).square().sum(), image, create_graph=True)
    grad.square().sum().backward()


def hessian(network, image):
    """Which takes a gradient that does not arrive for zeros."""
    torch.autograd.functional.hessian(lambda x: network(x).square().sum(), image[:, :, :2, :2, :2])


@pytest.mark.parametrize(
    "use",
    [
        second_derivative,
        hessian,
        lambda network, image: torch.jit.trace(network, image, check_trace=False),
        lambda network, image: torch.jit.script(network),
        lambda network, image: torch.export.export(network, (image,)),
        lambda network, image: torch.onnx.export(network, (image,), io.BytesIO(), dynamo=False),
        lambda network, image: torch.func.vmap(network)(image[None]),
    ],
    ids=["second derivative", "hessian", "trace", "script", "export", "onnx", "vmap"],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_work_names_the_way_back(use):
    network = nn.Sequential(
        nn.Conv3d(1, 2, 3, padding=1), nn.InstanceNorm3d(2), nn.ReLU(), nn.Conv3d(2, 2, 1)
    )
    with pytest.raises(Exception, match=r"effseg\.restore"):
        use(effseg.convert(network), torch.randn(1, 1, 4, 4, 4))


def test_a_running_training_goes_on():
    """Three steps as it is, then three converted or not: the same losses."""
    network, image = make("residual")
    labels = torch.randint(3, (2, 16, 20, 24))
    criterion = effseg.SegmentationLoss()
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)

    def train(model, optimizer):
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = criterion(model(image), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    before = train(network, optimizer)
    other, _ = make("residual")
    other.load_state_dict(network.state_dict())
    second = torch.optim.SGD(other.parameters(), 0.05, momentum=0.9)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = train(network, optimizer)
    found = train(effseg.convert(other, memory="block"), second)
    assert expected[-1] < before[0]
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        pytest.param("small", "raw", marks=pytest.mark.slow),
        ("small", "stream"),
        *(pytest.param(name, "raw", marks=pytest.mark.slow) for name in ("plain deep", "residual")),
        *(pytest.param("segresnet", memory, marks=pytest.mark.slow) for memory in ("raw", "stream")),
    ],
)
def test_with_kernels_in_the_interpreter(name, memory, kernel_device):
    """The Triton algorithm computes what ATen's does, in the size of its tests."""
    network, image = make(name, torch.float32)
    image = image[:1, :, :8, :4, :4].contiguous()
    converted = effseg.convert(network.to(kernel_device), memory=memory)
    labels = torch.randint(3, (1, 8, 4, 4), device=kernel_device)
    found = []
    for algorithm in ("triton", "aten"):
        converted.zero_grad()
        with effseg.algorithm(algorithm):
            loss = effseg.SegmentationLoss()(converted(image.to(kernel_device)), labels)
            loss.backward()
        grads = [p.grad.flatten() for p in converted.parameters() if p.grad is not None]
        found.append((loss.detach(), torch.cat(grads)))
    (loss, grads), (loss_of_aten, grads_of_aten) = found
    torch.testing.assert_close(loss, loss_of_aten, rtol=1e-5, atol=1e-6)
    assert (grads - grads_of_aten).norm() <= 1e-3 * grads_of_aten.norm()


def test_a_weighted_loss_of_cropped_logits():
    """They are lazy tensors still, of which weights take the type and the device."""
    network, image = make("plain")
    converted, weights = effseg.convert(network), torch.tensor([0.2, 1.0, 3.0])
    cropped = converted(image)[:, :, 1:]
    labels = torch.randint(3, (len(image), *cropped.shape[2:]))
    expected, found = (
        effseg.losses.dice_cross_entropy(logits, labels, class_weights=weights)
        for logits in (network(image)[:, :, 1:], cropped)
    )
    torch.testing.assert_close(found, expected)
    assert weights.to(cropped).dtype == cropped.dtype
    assert cropped.to(weights).dtype == cropped.to(tensor=weights).dtype == weights.dtype
    assert cropped.to(image.to(cropped.dtype)) is cropped


def test_monais_loss_takes_lazy_logits():
    losses = pytest.importorskip("monai.losses")
    network, image = make("basic", torch.float32)
    labels = torch.randint(3, (2, 1, *image.shape[2:]))
    criterion = losses.DiceCELoss(to_onehot_y=True, softmax=True)
    found = []
    for each in (network, effseg.convert(copy.deepcopy(network))):
        loss = criterion(each(image), labels)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in each.parameters())])
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    whole = torch.cat([g.flatten() for g in found[0]]).norm()
    assert all((a - b).norm() <= 1e-3 * whole for a, b in zip(*found, strict=True))


def test_a_metatensor_in_gives_one_out_with_its_metadata():
    data = pytest.importorskip("monai.data")
    network = nn.Sequential(
        nn.Conv3d(1, 2, 3, padding=1), nn.InstanceNorm3d(2), nn.ReLU(), nn.Conv3d(2, 2, 1)
    )
    image = data.MetaTensor(torch.randn(1, 1, 4, 4, 4), affine=torch.diag(torch.tensor([0.8, 0.8, 2.5, 1.0])))
    image.meta["filename_or_obj"] = "patient7.nii.gz"
    with torch.no_grad():
        found, expected = effseg.convert(network)(image), network(image)
    assert type(found) is type(expected)
    assert torch.equal(found.affine, expected.affine)
    assert found.meta["filename_or_obj"] == "patient7.nii.gz"
    torch.testing.assert_close(found.as_tensor(), expected.as_tensor())


@pytest.mark.parametrize("memory", ["raw", "block"])
def test_logits_have_the_strides_of_torchs(memory):
    network, image = make("plain")
    logits = effseg.convert(network, memory=memory)(image)
    assert logits.is_contiguous()
    assert logits.contiguous().view(2, -1).shape == (2, logits[0].numel())


def test_what_is_one_tensor_in_torch_is_one_here():
    """In place on the result of a dropout that drops nothing is in place on its input; padding copies."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.InstanceNorm3d(2), nn.ReLU())
            self.drop = nn.Dropout3d(0.0)

        def forward(self, x):
            kept = self.body(x)
            padded, same = nn.functional.pad(kept, [0] * 6), self.drop(kept)
            same += 1
            return kept, padded, same

    network, image = Network(), torch.randn(1, 1, 4, 4, 4)
    for a, b in zip(effseg.convert(network)(image), network(image), strict=True):
        torch.testing.assert_close(a, b)
