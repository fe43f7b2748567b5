"""Windows through networks and planes out of them. Needs no nnU-Net."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effseg.errors import InputError
from effseg.nnunet.prediction.export import LabelVolume
from effseg.nnunet.prediction.planes import Axis
from effseg.nnunet.prediction.slabs import Ensemble, Slabs

SIZE = (4, 6, 6)
CLASSES = 5


def windows(depth, flat=False):
    size = (1, *SIZE[1:]) if flat else SIZE
    steps = range(depth) if flat else range(0, depth - SIZE[0] + 1, 2)
    return SimpleNamespace(
        volume=(depth, 9, 12), size=size, flat=flat, starts=[list(steps), [0, 3], [0, 3, 6]],
        weights=lambda: torch.rand(size, generator=torch.Generator().manual_seed(0)) + 0.1,
    )  # fmt: skip


def labels_of(depth, batch=1, flat=False, network=None, wanted=None):
    """Labels, and the most elements of a tensor that was made."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d if flat else torch.nn.Conv3d
    network = network or convolution(1, CLASSES, 3, padding=1)
    image = torch.randn(1, depth, 9, 12, generator=torch.Generator().manual_seed(1))
    slabs = Slabs(windows(depth, flat), Ensemble([network], (), None), torch.device("cpu"), batch, True)
    wanted = wanted or (depth, 9, 12)
    properties = {"bbox_used_for_cropping": [[0, size] for size in wanted], "shape_before_cropping": wanted}
    axes = [Axis(*sizes) for sizes in zip((depth, 9, 12), wanted, strict=True)]
    inside = (slice(0, depth), slice(0, 9), slice(0, 12))
    names = SimpleNamespace(has_regions=False, foreground_labels=range(1, CLASSES))
    counted = []
    with torch.inference_mode(), Largest() as largest:
        volume = LabelVolume(axes, inside, properties, names)
        for index, logits in slabs.planes(image, CLASSES, counted.append):
            volume.push(index, logits)
    assert sum(counted) == len(slabs)
    return volume.volume, largest.elements


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return found


@pytest.mark.parametrize("flat", [False, True])
def test_batches_do_not_change_labels(flat):
    one, several = (labels_of(8, batch, flat)[0] for batch in (1, 4))
    assert (one == several).all()
    assert len(set(one.flat)) == CLASSES


def test_no_tensor_grows_with_the_number_of_planes():
    sizes = {depth: labels_of(depth, wanted=(2 * depth, 18, 24))[1] for depth in (8, 16, 64)}
    assert set(sizes.values()) == {CLASSES * SIZE[0] * 9 * 12}, "the ring is the largest"


class Overflows(torch.nn.Module):
    def __init__(self, always):
        super().__init__()
        self.always = always

    def forward(self, image):
        return image * (float("inf") if self.always or torch.is_autocast_enabled("cpu") else 2.0)


def test_overflow_under_autocast_is_computed_again():
    image = torch.rand(1, 1, 4, 4, 4)
    ensemble = Ensemble([Overflows(False)], (), torch.bfloat16)
    torch.testing.assert_close(ensemble(image), 2 * image)


def test_logits_that_are_not_finite_are_told():
    with pytest.raises(InputError, match="logits are not finite"):
        Ensemble([Overflows(True)], (), torch.bfloat16)(torch.rand(1, 1, 4, 4, 4))


def test_mirrored_windows_and_folds_are_averaged():
    torch.manual_seed(0)
    networks = [torch.nn.Conv3d(1, 2, 3, padding=1) for _ in range(2)]
    image = torch.rand(1, 1, 4, 5, 6)
    sums = [net(image.flip(axes)).flip(axes) for net in networks for axes in ([], [2], [4], [2, 4])]
    with torch.no_grad():
        torch.testing.assert_close(Ensemble(networks, (0, 2), None)(image), torch.stack(sums).mean(0))


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    seen = []

    class Small(torch.nn.Conv3d):
        def forward(self, image):
            seen.append(len(image))
            if len(image) > 1:
                raise torch.OutOfMemoryError
            return super().forward(image)

    torch.manual_seed(0)
    small = Small(1, CLASSES, 3, padding=1)
    assert (labels_of(8, 4, network=small)[0] == labels_of(8)[0]).all()
    assert seen[:3] == [4, 2, 1]
    assert set(seen[3:]) == {1}
