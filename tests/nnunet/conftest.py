"""nnU-Net in folders of its own; tests of this folder are skipped where it is not installed."""

import copy
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

MISSING = find_spec("nnunetv2") is None
collect_ignore_glob = ["test_*.py"] if MISSING else []
if not MISSING:
    import with_nnunet  # noqa: F401  so that nnU-Net can look trainers up

PLANS = json.loads((Path(__file__).parents[1] / "nnunet_plans.json").read_text())
LABELS = {"background": 0, "liver": 1, "spleen": 2}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """nnU-Net's three, with a preprocessed dataset that has no cases."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    for name in ("EFFSEG_MEMORY", "EFFSEG_NNUNET_EPOCHS", "EFFSEG_NNUNET_ITERATIONS"):
        monkeypatch.delenv(name, raising=False)
    cases = tmp_path / "preprocessed" / PLANS["dataset_name"] / "nnUNetPlans_3d_fullres"
    cases.mkdir(parents=True)
    (cases / "case.b2nd").touch()
    return tmp_path


@pytest.fixture
def make_trainer(folders):
    """Makes a trainer as nnU-Net does."""
    import torch

    def make(kind, labels=LABELS, **changes):
        plans = copy.deepcopy(PLANS) | {"continue_training": False}
        plans["configurations"]["3d_fullres"] |= changes
        dataset = {"labels": labels, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}
        if any(isinstance(value, list) for value in labels.values()):
            dataset["regions_class_order"] = [1, 2]
        return kind(plans, "3d_fullres", 0, dataset, torch.device("cpu"))

    return make
