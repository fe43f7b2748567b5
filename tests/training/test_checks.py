"""What a network cannot learn from is told before the first step."""

from types import SimpleNamespace

import pytest
import torch

import effseg
from effseg.errors import InputError
from effseg.models.base import SegmentationModel
from effseg.training import TrainingConfig
from effseg.training.checks import check_batch_norm


def check(network, *sizes, **values):
    cases = [SimpleNamespace(name=f"c{i}", image=torch.empty(1, *size)) for i, size in enumerate(sizes)]
    config = TrainingConfig(data="d", output="r", **values)
    check_batch_norm(network, SimpleNamespace(training=cases), config)


@pytest.fixture(scope="module")
def tiny():
    return effseg.EffSegNet(1, 3, preset="tiny", norm="batch")


def test_one_voxel_on_the_lowest_level_is_refused(tiny):
    with pytest.raises(InputError, match=r"^norm: .* effseg-tiny.* case c1, 20x32x1 voxels: .*norm instance"):
        check(tiny, (33, 1, 1), (20, 32, 1))
    with pytest.raises(InputError, match=r"^patch_size: .*patches of 32x32x32 voxels: use larger patches"):
        check(tiny, (64, 64, 64), patch_size=(32, 32, 32))
    with pytest.raises(InputError, match=r"unet3d, which has batch norm, .* 8x8x8 .* larger volumes$"):
        check(effseg.UNet3D(1, 3), (8, 8, 8), model="unet3d")


def test_what_has_more_voxels_or_another_norm_is_not(tiny):
    check(tiny, (33, 1, 1))
    check(tiny, (20, 32, 1), (20, 32, 1), batch_size=2)
    check(tiny, (64, 64, 64), patch_size=(32, 33, 32))
    for norm in ("instance", "group"):
        check(effseg.EffSegNet(1, 3, preset="tiny", norm=norm), (8, 8, 8))


def test_a_network_that_does_not_say_is_left_to_its_norms():
    class Other(SegmentationModel):
        def __init__(self):
            super().__init__("other", {})
            self.norm = torch.nn.BatchNorm3d(1)

    check(Other(), (8, 8, 8), model="other")
