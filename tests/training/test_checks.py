"""What a run cannot begin or go on with is told before its first step."""

from types import SimpleNamespace

import pytest
import torch

import effseg
from effseg.errors import InputError
from effseg.models.base import SegmentationModel
from effseg.training import TrainingConfig
from effseg.training.checks import check_batch_norm, check_global_batch
from effseg.training.sampling import Sampler


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


GROUP = effseg.EffSegNet(1, 3, preset="tiny", norm="group")


def goes_on(recorded, before, now, processes, network=GROUP, split_volume=1):
    """`before` and `now` are batch sizes; the processes that share a volume count as one."""
    configs = [
        TrainingConfig(data="d", output="r", model="effseg-tiny", batch_size=size, split_volume=shared)
        for size, shared in ((before, 1), (now, split_volume))
    ]
    check_global_batch(recorded, *configs, Sampler(4, 0, now, world_size=processes), network)


def test_the_cases_of_a_step_may_be_shared_otherwise():
    goes_on(1, 1, 1, processes=1)
    goes_on(2, 1, 1, processes=2, split_volume=3)
    goes_on(2, 1, 2, processes=1)
    goes_on(4, 2, 1, processes=4)
    goes_on(None, 1, 1, processes=2)  # begun by a version that did not record it


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            (1, 1, 1, 2),
            r"of 1 volumes a step .*, but now it is 2 .*: go on with 1 process of batch_size 1,",
        ),
        ((2, 1, 1, 1), r"go on with 2 processes of batch_size 1 or 1 process of batch_size 2, or begin anew"),
        ((6, 3, 3, 4), r"but now it is 12 .*: go on with 2 processes of batch_size 3, or"),
        ((None, 1, 2, 1), "batch_size = 1, but now it is 2: begin anew"),
    ],
)
def test_other_numbers_of_cases_a_step_are_refused(arguments, told):
    with pytest.raises(InputError, match=f"^r holds a run.*{told}") as error:
        goes_on(*arguments)
    assert "\n" not in str(error.value)


def test_who_shares_a_volume_is_told_in_processes():
    with pytest.raises(InputError, match="with 6 processes of batch_size 1 or 3 processes of batch_size 2"):
        goes_on(2, 1, 1, processes=1, split_volume=3)


def test_batch_norm_goes_on_with_as_many_cases_a_process(tiny):
    goes_on(2, 1, 1, processes=2, network=tiny)
    with pytest.raises(InputError, match="go on with 2 processes of batch_size 1, or begin anew"):
        goes_on(2, 1, 2, processes=1, network=tiny)
