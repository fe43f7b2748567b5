"""`effseg predict` as it is called: exit codes, one line for what is wrong, nothing half-written."""

import argparse
import gzip
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import effseg
from effseg.cli import main
from effseg.commands import predict as command
from effseg.data.labels import load_label_map
from effseg.data.nifti import read_image, read_labels
from effseg.data.preprocessing import Preprocessing
from effseg.phantom import write_dataset

SHAPE = (40, 32, 32)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"), cases=1, shape=SHAPE, unseen=2)


@pytest.fixture(scope="module")
def checkpoint(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    label_map = load_label_map(dataset)
    path = tmp_path_factory.mktemp("run") / "best.safetensors"
    effseg.EffSegNet(1, label_map.num_classes).save(
        path,
        extra={
            "preprocessing": Preprocessing().to_dict(),
            "labels": label_map.to_dict(),
            "training": {"patch_size": None},
        },
    )
    return path


def predict(checkpoint: Path, source: Path, output: Path, *more: str) -> int:
    paths = {"--checkpoint": checkpoint, "--input": source, "--output": output}
    return main(
        ["predict", "--device", "cpu", *(str(word) for pair in paths.items() for word in pair), *more]
    )


def test_a_folder_of_scans(
    dataset: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(checkpoint.parent, dataset / "imagesTs", tmp_path / "out") == 0
    told = capsys.readouterr().out.splitlines()
    written = sorted((tmp_path / "out").iterdir())
    assert len(written) == len(told) == 2
    for line, path in zip(told, written, strict=True):
        assert line.startswith(f"{path}: 40x32x32 voxels in ")
        scan = read_image(dataset / "imagesTs" / path.name.replace(".nii.gz", "_0000.nii.gz"))
        assert read_labels(path, scan).shape == SHAPE


def test_options(dataset: Path, checkpoint: Path, tmp_path: Path) -> None:
    source = next((dataset / "imagesTs").iterdir())
    output = tmp_path / "labels.nii.gz"
    assert predict(checkpoint, source, output, "--dtype", "bf16", "--largest-component") == 0
    assert predict(checkpoint, source, output) == 2
    assert predict(checkpoint, source, output, "--overwrite") == 0


def test_patches_are_not_shared(
    dataset: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network would take each patch for its rows of the whole scan."""
    network = effseg.load(checkpoint)
    network.extra["training"] = {"patch_size": [16, 16, 16]}
    network.save(tmp_path / "patches.safetensors")
    assert (
        predict(tmp_path / "patches.safetensors", dataset / "imagesTs", tmp_path / "out", "--split-volume")
        == 2
    )
    assert "split_volume: expected networks trained on whole volumes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_continues(
    dataset: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(checkpoint, dataset / "imagesTs", tmp_path / "out") == 0
    capsys.readouterr()
    assert predict(checkpoint, dataset / "imagesTs", tmp_path / "out", "--continue") == 0
    assert capsys.readouterr().out == "2 of 2 scans were segmented before\n"


def test_labels_beside_their_scans_are_no_scans(dataset: Path, checkpoint: Path, tmp_path: Path) -> None:
    for number, scan in enumerate((dataset / "imagesTs").iterdir()):
        (tmp_path / f"case{number}_ct.nii.gz").symlink_to(scan)
    assert predict(checkpoint, tmp_path, tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "case0.nii.gz", "case0_ct.nii.gz", "case1.nii.gz", "case1_ct.nii.gz"
    ]  # fmt: skip
    (tmp_path / "case1.nii.gz").unlink()
    assert predict(checkpoint, tmp_path, tmp_path, "--continue") == 0
    assert predict(checkpoint, tmp_path, tmp_path, "--overwrite") == 0
    assert len(list(tmp_path.iterdir())) == 4


def test_a_network_saved_in_python(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = next((dataset / "imagesTs").iterdir())
    effseg.EffSegNet(1, 3, preset="tiny").save(tmp_path / "x.safetensors")
    told = ["--window", "-200", "400", "--spacing", "20", "--labels", "2:liver,7:Milz"]
    assert predict(tmp_path / "x.safetensors", source, tmp_path / "out.nii", *told) == 0
    assert set(np.unique(np.asarray(nib.load(tmp_path / "out.nii").dataobj))) <= {0, 2, 7}
    capsys.readouterr()
    for more, message in (
        (told[3:], "window: expected two HU values"),
        (told[:5], "--labels"),
        ([*told[:-1], "liver"], "labels: expected 3 classes"),
        *(
            ([*told[:-1], labels], f"labels: expected names, or .*, got {labels!r}")
            for labels in ("", "liver,", "2:liver,Milz", "2:liver,2:Milz", "2:,7:Milz", "x/labels.json")
        ),
        ([*told[:4], "1", "2", *told[5:]], "spacing: expected one number or three, got 2"),
    ):
        assert predict(tmp_path / "x.safetensors", source, tmp_path / "other.nii", *more) == 2
        error = capsys.readouterr().err
        assert re.search(message, error)
        assert error.count("\n") == 1


def _truncated(folder: Path, scan: bytes) -> Path:
    path = folder / "scan.nii.gz"
    path.write_bytes(scan[: len(scan) // 2])
    return path


def _text(folder: Path, _: bytes) -> Path:
    path = folder / "scan.nii.gz"
    path.write_text("A letter.\n" * 100)
    return path


def _four_dimensional(folder: Path, _: bytes) -> Path:
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 3), np.int16), np.eye(4)), folder / "scan.nii.gz")
    return folder / "scan.nii.gz"


def _not_finite(folder: Path, _: bytes) -> Path:
    array = np.zeros((4, 4, 4), np.float32)
    array[1, 2, 3] = np.nan
    nib.save(nib.Nifti1Image(array, np.eye(4)), folder / "scan.nii.gz")
    return folder / "scan.nii.gz"


def _no_spacing(folder: Path, scan: bytes) -> Path:
    raw = gzip.decompress(scan)
    header = nib.Nifti1Header(raw[:348], check=False)
    header["pixdim"][2] = 0
    (folder / "scan.nii").write_bytes(header.binaryblock + raw[348:])
    return folder / "scan.nii"


def _empty(folder: Path, _: bytes) -> Path:
    return folder


def _missing(folder: Path, _: bytes) -> Path:
    return folder / "absent.nii.gz"


def _air(folder: Path, _: bytes) -> Path:
    nib.save(nib.Nifti1Image(np.full((4, 4, 4), -1000, np.int16), np.eye(4)), folder / "scan.nii.gz")
    return folder / "scan.nii.gz"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_missing, "no such file or folder"),
        (_truncated, "damaged, truncated"),
        (_text, "no NIfTI file"),
        (_four_dimensional, "expected a 3-D volume, found shape 4x4x4x3"),
        (_not_finite, "expected finite voxel values"),
        (_no_spacing, "expected positive voxel sizes in mm"),
        (_empty, "no cases: expected NIfTI files"),
        (_air, "no voxel is above -500 HU"),
    ],
)
def test_bad_scans(
    make: Callable[[Path, bytes], Path],
    message: str,
    dataset: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    good = next((dataset / "imagesTs").iterdir()).read_bytes()
    assert predict(checkpoint, make(folder, good), tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("effseg: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert str(folder) in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["scans"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--device", "abacus"], "device: expected auto, cpu, cuda or cuda:N, got 'abacus'"),
        (["--device", "meta"], "device: expected auto, cpu, cuda or cuda:N, got 'meta'"),
        (["--device", "cuda"], "finds no CUDA GPU"),
        (["--dtype", "int4"], "invalid choice: 'int4'"),
    ],
)
def test_bad_options(
    more: list[str],
    message: str,
    dataset: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert predict(checkpoint, dataset / "imagesTs", tmp_path / "out", *more) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize("content", [b"", b"no weights", None])
def test_bad_checkpoints(
    content: bytes | None, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert predict(path, dataset / "imagesTs", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"effseg: error: {path}: ")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_network_of_another_number_of_channels(
    dataset: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = effseg.load(checkpoint)
    path = tmp_path / "two.safetensors"
    effseg.EffSegNet(2, network.arguments["num_classes"]).save(path, extra=network.extra)
    source = next((dataset / "imagesTs").iterdir())
    assert predict(path, source, tmp_path / "out") == 2
    assert capsys.readouterr().err.endswith("the network takes 2 channels, the scan has 1 channel\n")


# nibabel leaves the file that it could not write to be closed by the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk(
    dataset: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands for the full disk."""
    source = next((dataset / "imagesTs").iterdir())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, before[1]))
    try:
        code = predict(checkpoint, source, tmp_path / "out.nii")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    expected = f"effseg: error: {tmp_path / 'out.nii'}: cannot be written: File too large\n"
    assert capsys.readouterr().err == expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_full_size_ct(real_data: Path, tmp_path: Path) -> None:
    """512x512x135 voxels through `base` within 8 GB and 4 minutes, on the scan's own grid."""
    torch.manual_seed(0)
    label_map = load_label_map(real_data, "ohif")
    checkpoint = tmp_path / "base.safetensors"
    effseg.EffSegNet(1, label_map.num_classes).save(
        checkpoint,
        extra={
            "preprocessing": Preprocessing().to_dict(),
            "labels": label_map.to_dict(),
            "training": {"patch_size": None},
        },
    )
    source = real_data / "case301_ct.nii.gz"
    program = f"""
import resource
from effseg.cli import main
assert main(["predict", "--device", "cpu", "--checkpoint", {str(checkpoint)!r}, "--input", {str(source)!r},
             "--output", {str(tmp_path)!r}]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) <= 8e9
    before, after = nib.load(source), nib.load(tmp_path / "case301.nii.gz")
    assert after.shape == before.shape
    np.testing.assert_array_equal(after.affine, before.affine)


def test_windows_are_told_for_each_channel():
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    told = ["--checkpoint", "c", "--input", "i", "--output", "o", "--window", "-200", "400"]
    one = command._preprocessing(parser.parse_args(told))
    two = command._preprocessing(parser.parse_args([*told, "--window", "0", "80"]))
    assert one is not None
    assert two is not None
    assert one.window == (-200.0, 400.0)
    assert two.window == ((-200.0, 400.0), (0.0, 80.0))
