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
