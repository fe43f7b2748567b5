"""`effseg plan --network`: nnU-Net's plans."""

import json
import shutil
from pathlib import Path

import pytest

from effseg import cli
from effseg.errors import InputError
from effseg.planning import network_plan
from effseg.planning.network_plan import plan_network
from effseg.planning.nnunet_plans import read_plans

PLANS = Path(__file__).parents[1] / "nnunet_plans.json"


@pytest.fixture
def dataset(tmp_path):
    """A plans file beside a dataset.json, as nnU-Net keeps them."""
    shutil.copy(PLANS, tmp_path / "nnUNetPlans.json")

    def write(labels):
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
        return tmp_path / "nnUNetPlans.json"

    return write


def test_reads_what_the_network_is_and_where_it_works(dataset):
    network = read_plans(dataset({"background": 0, "liver": 1, "spleen": 2, "ignore": 3}))
    assert (network.name, network.channels, network.classes) == ("PlainConvUNet", 1, 3)
    assert (network.patch, network.batch, network.median) == ((16, 32, 32), 2, (21, 50, 50))
    assert network.multiple == (2, 4, 4)
    assert network.padded((21, 50, 52)) == (22, 52, 52)


def test_regions_have_no_background(dataset):
    assert read_plans(dataset({"background": 0, "whole": [1, 2], "core": 2})).classes == 2


def test_a_cascade_sees_the_labels_of_the_stage_before(dataset):
    """As determine_num_input_channels of nnU-Net counts them: each label above 0 once, of regions, too."""
    path = dataset({"background": 0, "whole": [1, 2], "core": 2, "edge": [3], "ignore": 4})
    plans = json.loads(path.read_text())
    plans["configurations"]["cascade"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    path.write_text(json.dumps(plans))
    assert read_plans(path).channels == 1
    assert read_plans(path, "cascade").channels == read_plans(path, "cascade", classes=9).channels == 1 + 3
    (path.parent / "dataset.json").unlink()
    with pytest.raises(InputError, match="no such file, of whose labels a cascade's network has a channel"):
        read_plans(path, "cascade", classes=9)


def test_configurations_inherit():
    network = read_plans(PLANS, "small_batch", classes=3)
    assert (network.batch, network.patch) == (1, (16, 32, 32))


@pytest.mark.parametrize(
    ("configuration", "classes", "message"),
    [
        ("3d_lowres", 3, "expected a configuration '3d_lowres', the file has 2d, 3d_fullres"),
        ("2d", 3, "is not 3D"),
        ("circle", 3, "expected to inherit from another"),
        ("3d_fullres", None, "no such file; --classes says"),
    ],
)
def test_what_cannot_be_planned_is_named(configuration, classes, message):
    with pytest.raises(InputError, match=message):
        read_plans(PLANS, configuration, classes)


def test_plans_name_a_network_that_is_there(tmp_path):
    text = PLANS.read_text().replace("dynamic_network_architectures", "no_such_package")
    (tmp_path / "plans.json").write_text(text)
    with pytest.raises(InputError, match="is no-such-package installed"):
        read_plans(tmp_path / "plans.json", classes=3).build()


def planned():
    pytest.importorskip("dynamic_network_architectures")
    told = []
    plan = plan_network(
        read_plans(PLANS, classes=3), 10**8, headroom=0.0, tell=lambda *step: told.append(step)
    )
    for mode in network_plan.MODES:
        assert told.count((mode, (16, 32, 32))) == 1
        assert [size for name, size in told if name == mode][:2] == [(16, 32, 32), plan.whole]
    return plan


@pytest.fixture(scope="module")
def answer():
    """Of two modes, for time's sake."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network_plan, "MODES", (None, "raw"))
        return planned()


@pytest.mark.slow
def test_conversion_saves_memory_and_takes_larger_patches():
    answer = planned()
    assert [mode.memory for mode in answer.modes] == [None, "raw", "block", "stream"]
    for kind in ("patch", "whole"):
        stock, raw, block, _ = (getattr(mode, kind).peak for mode in answer.modes)
        assert stock > raw > block  # slabs of "stream" are as large as volumes this small
    voxels = [d * h * w for d, h, w in (mode.largest for mode in answer.modes)]
    assert voxels[:3] == sorted(voxels[:3])
    assert voxels[0] < voxels[1]


@pytest.mark.long
def test_sizes_are_ones_that_the_network_takes(answer):
    assert answer.whole == (22, 52, 52)
    for mode in answer.modes:
        assert all(n % m == 0 for n, m in zip(mode.largest, answer.network.multiple, strict=True))


@pytest.mark.long
def test_command_prints_a_table_or_json(answer, monkeypatch, capsys):
    monkeypatch.setattr("effseg.commands.plan.plan_network", lambda *_, **__: answer)
    command = ["plan", "--network", str(PLANS), "--classes", "3", "--gpu-memory", "100MB"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "PlainConvUNet, 3d_fullres:" in out
    assert "patch 16x32x32, batch 2" in out
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == answer.to_dict()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--network", str(PLANS), "--volume", "8x8x8"], "not allowed with argument"),
        (["--volume", "8x8x8"], "--classes: expected the number of classes"),
        ([], "one of the arguments --volume --network is required"),
        (["--network", "missing.json"], "missing.json: No such file"),
        (["--network", __file__, "--classes", "3"], "expected nnU-Net's plans, found no JSON"),
    ],
)
def test_bad_arguments_are_one_line(capsys, arguments, line):
    assert cli.main(["plan", *arguments, "--gpu-memory", "16GB"]) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1
