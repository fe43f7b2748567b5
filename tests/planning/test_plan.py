"""The planner and its command."""

import json
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effseg import cli
from effseg.errors import InputError
from effseg.memory.largest import STEP, largest
from effseg.memory.units import format_bytes, parse_bytes
from effseg.models import registry
from effseg.models.effsegnet import EffSegNet
from effseg.planning import Request, planner

COMMAND = ["plan", "--volume", "32x32x24", "--classes", "4", "--model", "unet3d", "--dtype", "fp32"]


@pytest.mark.parametrize(
    ("text", "count"),
    [("24GB", 24 * 10**9), ("24GiB", 24 * 2**30), ("1.5 gib", 3 * 2**29), ("1000", 1000), ("512MiB", 2**29)],
)
def test_parse_bytes(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "24 GBs", "-1GB", "24,5GB"])
def test_parse_bytes_names_what_it_cannot_read(text):
    with pytest.raises(InputError, match="expected a size like 24GB"):
        parse_bytes(text)


def test_format_bytes():
    assert format_bytes(3 * 2**29) == "1.50 GiB"
    assert format_bytes(2**20) == "1.00 MiB"


def curve(fixed, per_voxel, bend):
    """Stands in for predictions: bytes per voxel that fall a little as volumes grow, as they do."""

    def predict(volume):
        voxels = math.prod(volume)
        split = {"parameters": fixed, "optimizer": 2 * fixed}
        peak = int(3 * fixed + voxels * per_voxel + bend * voxels**0.7)
        return SimpleNamespace(reserved=peak, split=split, voxels=voxels, shape=(1, 1, *volume))

    return predict


@given(
    usable=st.integers(10**6, 10**12),
    fixed=st.integers(0, 10**9),
    per_voxel=st.floats(50, 5000),
    bend=st.floats(0, 20_000),
    z=st.integers(1, 1000),
)
def test_largest_sizes_fit_and_the_next_do_not(usable, fixed, per_voxel, bend, z):
    predict = curve(fixed, per_voxel, bend)
    for volume in (lambda s: (s, s, s), lambda s: (128, 96, s)):
        size = largest(predict, predict((128, 96, z)), usable, volume)
        assert size % STEP == 0
        assert size == 0 or predict(volume(size)).reserved <= usable
        assert predict(volume(size + STEP)).reserved > usable


@pytest.fixture
def no_search(monkeypatch):
    """The search for the largest volumes takes most of the time, and has its own test."""
    monkeypatch.setattr(planner, "largest", lambda *_: 40)


@pytest.mark.usefixtures("no_search")
def test_headroom_is_kept_free():
    request = Request((32, 32, 24), classes=4, model="unet3d", dtype="fp32")
    reserved = planner.plan(request, 10**9).report.reserved
    assert planner.plan(request, reserved, headroom=0).fits
    assert not planner.plan(request, int(1.05 * reserved), headroom=0.1).fits


@pytest.mark.parametrize(("memory", "headroom"), [(0, 0.1), (10**9, 1.0), (10**9, -0.1)])
def test_impossible_amounts_are_named(memory, headroom):
    with pytest.raises(InputError, match="expected"):
        planner.plan(Request((64, 64, 64), classes=4, model="unet3d"), memory, headroom)


def test_command_answers_by_text_and_exit_code(capsys, monkeypatch):
    """Once with the search for the largest volumes."""
    assert cli.main([*COMMAND, "--gpu-memory", "1GB"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Fits: training unet3d on 32x32x24, batch 1, 4 classes, fp32: needs ")
    assert "Largest that fits: cube " in out
    assert "outside the figure" in out.lower()
    monkeypatch.setattr(planner, "largest", lambda *_: 0)
    assert cli.main([*COMMAND, "--gpu-memory", "300MB"]) == 1
    assert capsys.readouterr().out.startswith("Does not fit: ")


def test_command_says_when_nothing_fits(capsys):
    assert cli.main([*COMMAND, "--gpu-memory", "100MB"]) == 1
    assert "Largest that fits: cube none, slices none" in capsys.readouterr().out


@pytest.fixture
def small_network(small_preset, monkeypatch):
    """The command knows the small preset."""
    name = f"effseg-{small_preset}"
    monkeypatch.setattr("effseg.commands.plan.MODEL_NAMES", (name,))
    monkeypatch.setitem(registry._FACTORIES, name, lambda *sizes: EffSegNet(*sizes, preset=small_preset))
    return name


@pytest.mark.usefixtures("no_search")
def test_command_compares_modes_and_baseline_in_json(capsys, small_network):
    command = ["plan", "--volume", "8x96x96", "--classes", "4", "--gpu-memory", "50MB", "--json"]
    assert cli.main([*command, "--model", small_network]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"] is True
    assert answer["gpu_memory"] == 50 * 10**6
    assert answer["prediction"]["model"] == small_network
    assert answer["prediction"]["peak"] == sum(answer["prediction"]["split"].values())
    assert answer["baseline"]["model"] == "unet3d"
    assert answer["baseline"]["peak"] > 5 * answer["prediction"]["peak"]
    assert answer["largest_cube"] == [40, 40, 40]
    assert answer["largest_slices"] == [8, 96, 40]
    thick = 8 * 16 * 96 * 96  # one slab of all rows, where a GPU's memory allows it
    settings = ("memory", "recompute_levels", "slab_elements")
    assert [tuple(mode[name] for name in settings) for mode in answer["modes"]] == [
        ("raw", 0, thick), ("raw", 0, None), ("stream", 0, thick), ("stream", 0, None),
        ("stream", 1, None), ("stream", 2, None),
    ]  # fmt: skip
    assert answer["mode"] == next(m for m in answer["modes"] if m["reserved"] <= answer["usable"])
    assert (answer["mode"]["memory"], answer["mode"]["recompute_levels"]) == ("stream", 0)
    thick_raw, raw, *streams = (mode["arithmetic"] for mode in answer["modes"])
    assert thick_raw <= raw == 1 < streams[0]
    assert streams == sorted(set(streams))
    assert streams[-1] < 1.7


@pytest.mark.slow
@pytest.mark.usefixtures("no_search")
def test_command_keeps_to_the_mode_asked_for(capsys):
    command = ["plan", "--volume", "48x32x32", "--classes", "4", "--gpu-memory", "90MB", "--memory", "stream"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "\nMemory mode: stream, " in out
    assert "\nraw " in out
    assert "\nstream, level 1 recomputed " in out


@pytest.mark.slow
@pytest.mark.usefixtures("no_search")
def test_command_shows_what_lies_on_the_host(capsys, small_network):
    command = ["plan", "--volume", "64x32x32", "--classes", "4", "--memory", "stream", "--offload"]
    command += ["--model", small_network, "--gpu-memory"]
    assert cli.main([*command, "1MB", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    on_host = [mode for mode in answer["modes"] if mode["offload"]]
    level = 3 * 16 * 32 * 16 * 16 * 2
    assert {(mode["host"], mode["to_host"]) for mode in on_host} == {(level, level)}
    assert {mode["host"] for mode in answer["modes"] if not mode["offload"]} == {0}
    assert answer["mode"]["offload"]
    assert cli.main([*command, "1MB"]) == 1
    out = capsys.readouterr().out
    assert "host: 0.75 MiB of pinned memory, 12.0 B/voxel; a step copies 0.75 MiB there" in out
    assert "\nstream, level 1 offloaded " in out
    assert "\nstream, level 1 offloaded, level 2 recomputed " in out


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            ["--volume", "512x512"],
            "--volume: expected three sizes of 1 or more, as in 512x512x300, got '512x512'",
        ),
        (["--volume", "512x0x512"], "--volume: expected three sizes of 1 or more"),
        (["--gpu-memory", "lots"], "expected a size like 24GB or 24GiB, got 'lots'"),
        (["--classes", "1"], "num_classes: expected 2 or more"),
        (["--channels", "0"], "expected"),
        (["--model", "unet4d"], "invalid choice: 'unet4d'"),
        (["--memory", "none"], "invalid choice: 'none'"),
        (["--offload"], "offload: expected an EffSegNet with a full-resolution level, got unet3d"),
        (
            ["--offload", "--model", "effseg-tiny"],
            "offload: expected an EffSegNet with a full-resolution level",
        ),
        (
            ["--offload", "--model", "effseg-base", "--memory", "raw"],
            "offload: expected memory stream or auto",
        ),
        (
            ["--offload", "--model", "effseg-base", "--gpus", "2"],
            "offload: expected 1 GPU for a volume, got 2",
        ),
    ],
)
def test_bad_arguments_are_one_line(capsys, change, line):
    assert cli.main([*COMMAND, "--gpu-memory", "16GB", *change]) == 2
    err = capsys.readouterr().err
    assert err.startswith("effseg: error: ")
    assert line in err
    assert err.count("\n") == 1
