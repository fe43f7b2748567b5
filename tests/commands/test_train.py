"""`effseg train` as a user calls it: good and bad input."""

import json
import resource
import shutil

import nibabel as nib
import numpy as np
import pytest

import effseg
from effseg import phantom
from effseg.cli import main

SHAPE = (20, 16, 12)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return phantom.write_dataset(tmp_path_factory.mktemp("phantoms"), cases=5, shape=SHAPE, unseen=0)


@pytest.fixture
def data(phantoms, tmp_path):
    """A data set that a test may spoil."""
    return shutil.copytree(phantoms, tmp_path / "data")


@pytest.fixture
def call(tmp_path, capsys):
    """Runs the command; returns its exit code and what it printed on both streams."""

    def call(data, *options, steps=2):
        command = ["train", "--data", str(data), "--output", str(tmp_path / "run"), "--steps", str(steps)]
        code = main([*command, "--model", "effseg-tiny", "--workers", "0", *options])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refuse(call, tmp_path):
    """Runs the command, which must print one line of error that holds all `words`, and leave no network."""

    def refuse(data, *options, words, **values):
        code, _, errors = call(data, *options, **values)
        assert code == 2, errors
        assert errors.startswith("effseg: error: ")
        assert errors.count("\n") == 1
        for word in words:
            assert word in errors
        run = tmp_path / "run"
        assert not list(run.glob("*.safetensors"))
        assert not list(run.rglob(".writing-*"))

    return refuse


def change(path, edit):
    """Rewrite a NIfTI file: edit(array, affine) -> (array, affine)."""
    volume = nib.load(path)
    array, affine = edit(np.asarray(volume.dataobj).copy(), volume.affine.copy())
    nib.save(nib.Nifti1Image(array, affine), path)


def test_trains_and_tells_about_it(phantoms, call, tmp_path):
    code, output, _ = call(phantoms, "--validation-interval", "2")
    assert code == 0
    assert "1.74 M parameters, 10 organs, fp32 on 1 x cpu; 4 training and 1 validation cases" in output
    assert "step 2/2  validation Dice 0." in output
    assert "liver 0." in output
    assert "GiB" in output
    assert "\x1b" not in output
    assert effseg.load(tmp_path / "run" / "final.safetensors").name == "effseg-tiny"
    assert call(phantoms, "--validation-interval", "2")[0] == 0


def test_the_baseline_trains_on_patches(phantoms, call, tmp_path):
    options = ["--patch-size", "16", "--spacing", "15", "14", "13", "--crop", "none", "--no-augment"]
    code, _, errors = call(phantoms, *options, "--model", "unet3d", "--fold", "all", steps=1)
    assert code == 0, errors
    assert effseg.load(tmp_path / "run" / "final.safetensors").extra["training"]["patch_size"] == [16, 16, 16]


def test_selected_organs_are_learnt(phantoms, call, tmp_path):
    assert call(phantoms, "--labels", "liver,spleen", "--fold", "all", "--epochs", "1")[0] == 0
    model = effseg.load(tmp_path / "run" / "final.safetensors")
    assert model.extra["labels"]["names"] == ["background", "liver", "spleen"]
    assert model.extra["training"]["step"] == 5


def test_missing_and_empty_folders(refuse, tmp_path):
    refuse(tmp_path / "nowhere", words=["nowhere"])
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", words=["empty"])


def test_missing_labels(data, refuse):
    (data / "labelsTr" / "phantom_003.nii.gz").unlink()
    refuse(data, words=["phantom_003"])


def test_label_map_without_foreground(data, refuse):
    path = data / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": {"background": 0}}))
    refuse(data, words=["dataset.json", "foreground"])


def test_unknown_label_value(data, refuse):
    def edit(array, affine):
        array[0, 0, 0] = 77
        return array, affine

    change(data / "labelsTr" / "phantom_002.nii.gz", edit)
    refuse(data, words=["phantom_002.nii.gz", "77"])


def test_labels_without_any_chosen_organ(data, refuse):
    for path in (data / "labelsTr").iterdir():
        change(path, lambda array, affine: (array * 0, affine))
    refuse(data, words=["no training case shows any of liver"])


def test_grids_that_differ(data, refuse):
    def edit(array, affine):
        affine[0, 3] += 5.0
        return array, affine

    change(data / "labelsTr" / "phantom_001.nii.gz", edit)
    refuse(data, words=["phantom_001.nii.gz", "grid"])


def test_voxels_that_are_no_numbers(data, refuse):
    def edit(array, affine):
        array = array.astype(np.float32)
        array[1, 2, 3] = np.nan
        return array, affine

    change(data / "imagesTr" / "phantom_004_0000.nii.gz", edit)
    refuse(data, words=["phantom_004_0000.nii.gz"])


def test_truncated_scan(data, refuse):
    path = data / "imagesTr" / "phantom_000_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:400])
    refuse(data, words=["phantom_000_0000.nii.gz"])


def test_unknown_cases_and_organs(phantoms, refuse):
    refuse(phantoms, "--cases", "phantom_009", words=["phantom_009"])
    refuse(phantoms, "--validation", "phantom_000-phantom_009", words=["phantom_000-phantom_009"])
    refuse(phantoms, "--labels", "heart", words=["heart"])
    refuse(phantoms, "--cases", "phantom_001", "--validation", "phantom_001", words=["left to train on"])


def test_too_few_cases_for_a_split(phantoms, refuse):
    refuse(phantoms, "--cases", "phantom_000-phantom_003", words=["5"])


def test_values_out_of_range(phantoms, refuse):
    refuse(phantoms, "--learning-rate", "-1", words=["learning_rate", "-1.0"])
    refuse(phantoms, "--window", "400", "-200", words=["window"])
    refuse(phantoms, "--model", "resnet", words=["resnet"])


def test_patch_larger_than_a_volume(phantoms, refuse):
    refuse(
        phantoms,
        "--patch-size",
        "16",
        "16",
        "13",
        "--crop",
        "none",
        words=["16x16x13", "20x16x12", "phantom"],
    )


def test_sizes_that_do_not_agree_in_a_batch(data, refuse):
    for folder, name in (("imagesTr", "phantom_003_0000"), ("labelsTr", "phantom_003")):
        change(data / folder / f"{name}.nii.gz", lambda array, affine: (array[:-1], affine))
    options = ("--batch-size", "2", "--crop", "none", "--fold", "all")
    refuse(data, *options, words=["batch_size", "20x16x12", "phantom_003", "19x16x12"])


def test_run_of_another_configuration(phantoms, call):
    assert call(phantoms, "--fold", "all", steps=1)[0] == 0
    code, _, errors = call(phantoms, "--fold", "all", "--seed", "3", steps=1)
    assert code == 2
    assert "seed = 0, but now it is 3" in errors
    assert call(phantoms, "--fold", "all", "--seed", "3", "--overwrite", steps=1)[0] == 0


def test_output_that_is_a_file(phantoms, refuse, tmp_path):
    (tmp_path / "run").write_text("")
    refuse(phantoms, words=[str(tmp_path / "run")])


def test_damaged_checkpoint(phantoms, call, tmp_path):
    assert call(phantoms, "--fold", "all", steps=1)[0] == 0
    (tmp_path / "run" / "checkpoints" / "step-00000001" / "state.pt").write_bytes(b"damaged")
    code, _, errors = call(phantoms, "--fold", "all", steps=1)
    assert code == 2
    assert "step-00000001" in errors


def test_a_full_disk_leaves_nothing_half_written(phantoms, refuse, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        refuse(phantoms, "--fold", "all", steps=1, words=["step-00000001: cannot be written"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_of_several_processes_the_first_one_tells(call, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert call(tmp_path / "nowhere") == (2, "", "")
