"""The trainers, step by step, beside nnU-Net's own."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from effseg.errors import InputError
from effseg.nnunet import TRAINERS, VARIABLE, announce
from effseg.nnunet.network import WholeVolumeNet
from effseg.nnunet.patches import nnUNetTrainerEffSeg
from effseg.nnunet.volumes import nnUNetTrainerEffSegFull

REGIONS = {"background": 0, "whole": [1, 2], "core": [2, 3]}


@pytest.mark.filterwarnings("ignore")  # it imports every trainer there is
@pytest.mark.parametrize("kind", [nnUNetTrainerEffSeg, nnUNetTrainerEffSegFull])
def test_nnunet_finds_them(kind, monkeypatch):
    monkeypatch.setenv(VARIABLE, "/elsewhere")
    announce()
    announce()
    assert recursive_find_trainer_class_by_name(kind.__name__) is kind
    assert nnUNetTrainer.__init__.__code__.co_varnames[:6] == kind.__init__.__code__.co_varnames[:6]


def test_announcing_keeps_other_folders(monkeypatch):
    monkeypatch.setenv(VARIABLE, "/elsewhere")
    announce()
    announce()
    assert os.environ[VARIABLE] == os.pathsep.join(("/elsewhere", TRAINERS))


def started(trainer, weights=None):
    trainer.initialize()
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    trainer.lr_scheduler.step(0)
    if weights is not None:
        trainer.network.load_state_dict(weights)
    return trainer


def log_of(trainer):
    return Path(trainer.log_file).read_text().splitlines()


def test_the_log_names_memory_mode_and_saving(make_trainer, monkeypatch):
    monkeypatch.setenv("EFFSEG_MEMORY", "block")
    trainer = started(make_trainer(nnUNetTrainerEffSeg))
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)
    trainer.on_train_start()
    (told,) = (line for line in log_of(trainer) if "effseg: " in line)
    assert re.search(
        r"effseg: memory block: .* on 1x1x16x32x32: a step keeps \d+ of \d+ bytes per voxel", told
    )


def patches(channels=1):
    """A batch as nnU-Net's loader makes it: labels, or masks of regions."""
    draw = torch.Generator().manual_seed(0)
    sizes = ((16, 32, 32), (16, 16, 16))
    target = [torch.randint(0, 3, (2, 1, *size), generator=draw, dtype=torch.int16) for size in sizes]
    if channels > 1:
        target = [torch.cat([(t > k).to(torch.int16) for k in range(channels)], 1) for t in target]
    return {"data": torch.randn((2, 1, 16, 32, 32), generator=draw), "target": target}


@pytest.mark.parametrize(
    ("labels", "channels", "memory"),
    [
        ({"background": 0, "liver": 1, "spleen": 2}, 1, "raw"),
        ({"background": 0, "liver": 1, "ignore": 2}, 1, "block"),
        ({"background": 0, "liver": 1, "ignore": 2}, 1, "stream"),
        (REGIONS, 2, "raw"),
    ],
    ids=["labels", "ignore", "ignore, streamed", "regions"],
)
def test_a_step_is_nnunets(make_trainer, monkeypatch, labels, channels, memory):
    monkeypatch.setenv("EFFSEG_MEMORY", memory)
    torch.manual_seed(0)
    own = started(make_trainer(nnUNetTrainer, labels))
    weights = {name: value.clone() for name, value in own.network.state_dict().items()}
    ours = started(make_trainer(nnUNetTrainerEffSeg, labels), weights)
    for trainer in (own, ours):
        trainer.network.train()
    losses = [float(trainer.train_step(patches(channels))["loss"]) for trainer in (own, ours)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, value in own.network.state_dict().items():
        torch.testing.assert_close(ours.network.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    assert not torch.equal(weights["decoder.seg_layers.1.weight"], value)
    for trainer in (own, ours):
        trainer.network.load_state_dict(weights)
        trainer.network.eval()
    with torch.no_grad():
        expected, found = (trainer.validation_step(patches(channels)) for trainer in (own, ours))
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for count in ("tp_hard", "fp_hard", "fn_hard"):
        np.testing.assert_allclose(found[count], expected[count], atol=2)


def test_checkpoints_are_nnunets(make_trainer, tmp_path):
    """Also those that training continues from."""
    ours = started(make_trainer(nnUNetTrainerEffSeg))
    ours.network.train()
    ours.train_step(patches())
    ours.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    own = make_trainer(nnUNetTrainer)
    own.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    for name, value in ours.network.state_dict().items():
        torch.testing.assert_close(own.network.state_dict()[name], value, rtol=0, atol=0)


class Tiny(nnUNetTrainerEffSegFull):
    preset = "tiny"


def volume(size=(9, 12, 13)):
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (1, *size), generator=draw, dtype=torch.uint8)
    return {"data": torch.randn((1, 1, *size), generator=draw), "target": labels}


def whole(trainer):
    trainer = started(trainer)
    ignore = trainer.label_manager.ignore_label
    trainer.loss_options = {"class_weights": None, "ignore_index": ignore, "process_group": None}
    return trainer


@pytest.mark.parametrize("memory", ["raw", "stream"])
def test_whole_volumes_of_any_size(make_trainer, monkeypatch, memory):
    monkeypatch.setenv("EFFSEG_MEMORY", memory)
    kind = Tiny if memory == "raw" else nnUNetTrainerEffSegFull  # tiny has nothing to stream
    trainer = whole(make_trainer(kind, spacing=[5.0, 1.0, 1.0]))
    assert trainer.network.name == f"effseg-{kind.preset}"
    assert trainer.network.arguments["thick_axis"] == 0
    trainer.network.train()
    losses = [float(trainer.train_step(volume())["loss"]) for _ in range(3)]
    assert losses[-1] < losses[0]
    told = [line for line in log_of(trainer) if "effseg: memory" in line]
    assert len(told) == 1
    assert f"effseg: memory {memory} from a volume of 9x12x13 on" in told[0]
    found = trainer.validation_step(volume((7, 10, 8)))
    assert (found["tp_hard"] + found["fn_hard"]).tolist() == [
        int((volume((7, 10, 8))["target"] == k).sum()) for k in (1, 2)
    ]


class Normed(Tiny):
    """By batch norm, which tracks statistics."""

    @classmethod
    def build_network_architecture(
        cls, plans_manager, configuration_manager, num_input_channels, num_output_channels, *_
    ):
        return WholeVolumeNet(num_input_channels, num_output_channels, preset="tiny", norm="batch")


def test_a_step_that_is_not_finite_leaves_the_network_as_it_was(make_trainer):
    trainer, batch = whole(make_trainer(Normed)), volume((40, 12, 13))
    trainer.network.train()
    trainer.train_step(batch)
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    batch["data"][0, 0, 0, 0, 0] = torch.nan
    trainer.train_step(batch)
    for name, value in trainer.network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_ignored_voxels_count_nowhere(make_trainer):
    trainer = whole(make_trainer(Tiny, {"background": 0, "liver": 1, "ignore": 2}))
    trainer.network.eval()
    with torch.no_grad():
        found = trainer.validation_step(volume())
    assert found["tp_hard"] + found["fn_hard"] == int((volume()["target"] == 1).sum())
    assert found["fp_hard"] <= int((volume()["target"] == 0).sum())


def test_whole_volumes_take_labels_of_one_stage(make_trainer):
    with pytest.raises(InputError, match=r"expected labels, dataset\.json has regions"):
        make_trainer(nnUNetTrainerEffSegFull, REGIONS)
    with pytest.raises(InputError, match="expected 3d_fullres or 3d_lowres, got 3d_fullres"):
        make_trainer(nnUNetTrainerEffSegFull, previous_stage="3d_lowres")


def test_patches_are_3d(make_trainer):
    trainer = make_trainer(nnUNetTrainerEffSeg, patch_size=[32, 32])
    with pytest.raises(InputError, match="expected a 3D configuration"):
        trainer.initialize()


def test_length_is_set_from_outside(make_trainer, monkeypatch):
    monkeypatch.setenv("EFFSEG_NNUNET_EPOCHS", "2")
    for kind in (nnUNetTrainerEffSeg, nnUNetTrainerEffSegFull):
        assert make_trainer(kind).num_epochs == 2
