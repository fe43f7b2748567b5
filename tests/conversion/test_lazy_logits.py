"""Lazy logits of a converted network, as code that knows nothing of them takes them for tensors."""

import copy
import io

import pytest
import torch
from convertible import make
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import effseg
from effseg.conversion import LazyTensor


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


@torch.no_grad()
def change_data(parameters):
    for parameter in parameters:
        parameter.data.add_(1)


@torch.no_grad()
def change_vector(parameters):
    vector_to_parameters(parameters_to_vector(parameters) + 1, parameters)


CHANGES = {
    "step": lambda parameters: torch.optim.SGD(parameters, 1.0).step(),
    "fused step": lambda parameters: torch.optim.AdamW(parameters, 1.0, fused=True).step(),
    "data": change_data,
    "vector": change_vector,
}


@pytest.mark.parametrize("memory", ["raw", "block", "stream"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_parameters_leaves_logits_as_they_were(change, memory):
    """One that torch counts (the first) and others; of frozen parameters, too."""
    network, image = make("small")
    network.decoder.seg_layers[-1].bias.requires_grad_(False)
    labels, found = torch.randint(2, (2, *image.shape[2:])), []
    for each in (network, effseg.convert(copy.deepcopy(network), memory=memory, leave_alone=False)):
        logits = each(image)
        effseg.SegmentationLoss()(logits, labels).backward()
        CHANGES[change](list(each.parameters()))
        assert isinstance(logits, LazyTensor) == (each is not network)
        found.append(logits.detach())
        assert not torch.allclose(each(image).detach(), found[-1])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.InstanceNorm3d(2, affine=True), nn.ReLU())
        self.auxiliary, self.head = nn.Conv3d(2, 2, 1), nn.Conv3d(2, 2, 1)

    def forward(self, x):
        x = self.body(x)
        self.seen = self.auxiliary(x)
        return self.head(x)


def test_a_change_of_parameters_leaves_what_modules_remember():
    network, image = Remembering().double(), torch.randn(1, 1, 4, 4, 4, dtype=torch.float64)
    converted, found = effseg.convert(copy.deepcopy(network), leave_alone=False), []
    for each in (network, converted):
        each(image)
        change_data(each.parameters())
        each.seen.square().mean().backward()
        found.append([each.seen.detach(), each.auxiliary.weight.grad])
    assert isinstance(converted.seen, LazyTensor)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


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


class Plain(torch.Tensor):
    pass


def test_logits_become_tensors_of_another_class():
    network, image = make("small")
    found = []
    for each in (network, effseg.convert(copy.deepcopy(network), memory="stream")):
        logits = each(image)
        assert logits.as_subclass(type(logits)).shape == logits.shape
        other = logits.as_subclass(Plain)
        assert type(other) is Plain
        assert type(logits.as_subclass(torch.Tensor)) is torch.Tensor
        assert other.is_contiguous()
        with torch.no_grad():
            other[:, 0] = 0  # the same memory
        assert not logits[:, 0].any()
        torch.relu(other).square().sum().backward()
        found.append([other.detach(), *(p.grad for p in each.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_monais_transforms_take_lazy_logits():
    monai = pytest.importorskip("monai")
    network, image = make("small")
    converted = effseg.convert(copy.deepcopy(network))
    for transform in (
        monai.data.MetaTensor,
        monai.transforms.Activations(softmax=True, dim=1),
        monai.transforms.AsDiscrete(argmax=True, dim=1),
    ):
        found, expected = transform(converted(image)), transform(network(image))
        assert type(found) is type(expected)
        torch.testing.assert_close(found.as_tensor(), expected.as_tensor(), rtol=1e-9, atol=1e-9)


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
