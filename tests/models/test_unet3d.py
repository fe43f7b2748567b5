"""The baseline network and the default loss and segmentation."""

import pytest
import torch

from effseg.errors import InputError
from effseg.losses import dice_cross_entropy
from effseg.models.registry import build_model
from effseg.models.unet3d import UNet3D


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return UNet3D(1, 4).eval()


def test_parameters_are_the_papers():
    with torch.device("meta"):
        network = UNet3D(1, 15)
    assert sum(p.numel() for p in network.parameters()) == 19_074_575


@pytest.mark.parametrize("size", [(16, 8, 8), (9, 11, 17), (1, 1, 1), (7, 1, 3)])
def test_any_size_comes_back(model, size):
    assert model(torch.randn(2, 1, *size)).shape == (2, 4, *size)


@pytest.mark.parametrize("size", [(1, 8, 9), (17, 16, 33)])
def test_voxels_of_the_lowest_level(size):
    with torch.device("meta"):
        network, seen = UNet3D(1, 4).eval(), []
        network.encoder[-1].register_forward_hook(lambda *args: seen.append(args[-1].shape[2:]))
        network(torch.empty(1, 1, *size))
    assert seen == [network.lowest_level(size)]


def test_upsampled_tensors_are_cropped_at_the_far_end(model):
    """Far from the far border, an odd-sized image and the same image with more behind it agree."""
    image = torch.randn(1, 1, 90, 8, 8)
    inside = torch.cat((image, torch.randn(1, 1, 7, 8, 8)), 2)
    torch.testing.assert_close(model(image[:, :, :89])[:, :, :30], model(inside)[:, :, :30])


def test_integer_images_are_taken_as_they_are(model):
    image = torch.randint(-1000, 1000, (1, 1, 8, 9, 10), dtype=torch.int16)
    assert torch.equal(model(image), model(image.float()))


def test_loss_is_the_plain_formula_of_the_logits(model):
    image, labels = torch.randn(1, 1, 9, 8, 8), torch.randint(0, 4, (1, 9, 8, 8), dtype=torch.uint8)
    options = {"include_background": True, "label_smoothing": 0.1}
    expected = dice_cross_entropy(model(image), labels, **options)
    assert torch.equal(model.loss(image, labels, **options), expected)


def test_segment_is_the_argmax_without_a_graph(model):
    image = torch.randn(1, 1, 9, 8, 8)
    labels = model.segment(image)
    assert labels.dtype == torch.uint8
    assert not labels.requires_grad
    assert torch.equal(labels.long(), model(image).argmax(1))
    probable = model.probabilities(image)
    assert (probable - model(image).softmax(1)).abs().max() <= 2**-12
    with torch.autocast("cpu", torch.bfloat16):
        assert (model.probabilities(image) - probable).abs().max() <= 0.1


def test_segment_of_many_classes_is_int16():
    labels = UNet3D(1, 300).eval().segment(torch.randn(1, 1, 2, 2, 2))
    assert labels.dtype == torch.int16


@pytest.mark.parametrize("shape", [(1, 8, 8, 8), (1, 2, 8, 8, 8), (1, 1, 8, 0, 8)])
def test_wrong_images_are_named(model, shape):
    with pytest.raises(InputError, match=r"image: expected \(N, 1, D, H, W\)"):
        model(torch.zeros(shape))


def test_batch_norm_of_one_voxel_is_named():
    with pytest.raises(InputError, match="batch norm needs more than one voxel"):
        UNet3D(1, 4).train()(torch.zeros(1, 1, 8, 8, 8))


@pytest.mark.parametrize(("channels", "classes"), [(0, 4), (1, 1)])
def test_impossible_sizes_are_named(channels, classes):
    with pytest.raises(InputError, match="expected"):
        UNet3D(channels, classes)


def test_build_model():
    assert build_model("unet3d", 2, 5).arguments == {"in_channels": 2, "num_classes": 5}
    with pytest.raises(InputError, match=r"model: expected one of effseg-base, .*, got 'unet4d'"):
        build_model("unet4d", 1, 2)
