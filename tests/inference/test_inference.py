"""Prediction: from scans in any orientation to label files on their own grids."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

import effseg
from effseg.data.labels import LabelMap
from effseg.data.nifti import read_image, read_labels
from effseg.data.preprocessing import Preprocessing
from effseg.errors import InputError
from effseg.inference import (
    Predictor,
    keep_largest_components,
    load_predictor,
    predict_files,
    predict_scan,
    segment,
)
from effseg.models.base import SegmentationModel

SHAPE = (14, 12, 10)
LABEL_MAP = LabelMap(("background", "soft", "bone"), (0, 4, 300))
PREPROCESSING = Preprocessing(window=(-1000.0, 2000.0), margin=0.0)


class Nearest(SegmentationModel):
    """Class 0, 1, 2 for intensities near -1000, 0 and 2000 HU: an answer that is known for every voxel."""

    def __init__(self, in_channels: int = 1) -> None:
        super().__init__("nearest", {"in_channels": in_channels, "num_classes": 3})
        self.centres = nn.Parameter(torch.tensor([-1.5, -0.5, 1.5]))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        assert not self.training
        self.seen.append(tuple(image.shape))
        return -((image[:, :1] - self.centres.view(1, 3, 1, 1, 1)) ** 2)


def torso() -> np.ndarray:
    array = np.full(SHAPE, -1000, np.int16)
    array[2:12, 3:11, 1:9] = 0
    array[4:7, 5:7, 2:8] = 2000
    return array


def expected(array: np.ndarray) -> np.ndarray:
    return np.select([array < -500, array < 1000], [0, 4], 300).astype(np.uint16)


def write(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([-1.5, 2.0, 3.0, 1.0]) if affine is None else affine), path)
    return path


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(Nearest(), PREPROCESSING, LABEL_MAP)


class TestScan:
    def test_the_crop_goes_in_and_file_values_on_the_whole_grid_come_out(self, tmp_path: Path) -> None:
        model = Nearest()
        scan = read_image(write(tmp_path / "scan.nii", torso()))
        labels = predict_scan(model, scan, PREPROCESSING, LABEL_MAP)
        assert model.seen == [(1, 1, 10, 8, 8)]
        assert labels.dtype == np.uint16
        np.testing.assert_array_equal(labels, expected(scan.array[0]))

    def test_the_models_mode_and_gradients_are_left_alone(self, tmp_path: Path) -> None:
        scan = read_image(write(tmp_path / "scan.nii", torso()))
        model = Nearest().train()
        predict_scan(model, scan, PREPROCESSING, LABEL_MAP)
        assert model.training
        assert model.centres.grad is None

    def test_bf16(self, tmp_path: Path) -> None:
        scan = read_image(write(tmp_path / "scan.nii", torso()))
        labels = predict_scan(Nearest(), scan, PREPROCESSING, LABEL_MAP, bf16=True)
        np.testing.assert_array_equal(labels, expected(scan.array[0]))

    @pytest.mark.parametrize("patch_size", [(4, 4, 4), (16, 8, 8)])
    @pytest.mark.parametrize("bf16", [False, True])
    def test_patches(self, tmp_path: Path, patch_size: tuple[int, int, int], bf16: bool) -> None:
        model = Nearest()
        scan = read_image(write(tmp_path / "scan.nii", torso()))
        labels = predict_scan(model, scan, PREPROCESSING, LABEL_MAP, patch_size=patch_size, bf16=bf16)
        assert {shape[2:] for shape in model.seen} == {patch_size}
        np.testing.assert_array_equal(labels, expected(scan.array[0]))

    def test_patches_overlap_by_half(self) -> None:
        model = Nearest()
        segment(model, torch.zeros(1, 1, 8, 4, 4), patch_size=(4, 4, 4))
        assert len(model.seen) == 3

    def test_channels(self, tmp_path: Path) -> None:
        scan = read_image(write(tmp_path / "scan.nii", torso()))
        with pytest.raises(
            InputError, match=r"scan\.nii: the network takes 2 channels, the scan has 1 channel$"
        ):
            predict_scan(Nearest(2), scan, PREPROCESSING, LABEL_MAP)

    def test_too_large_for_the_gpu(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        scan = read_image(write(tmp_path / "scan.nii", torso()))
        monkeypatch.setattr(Nearest, "forward", full)
        with pytest.raises(InputError, match=r"scan\.nii: 10x8x8 voxels do not fit on the GPU; --device cpu"):
            predict_scan(Nearest(), scan, PREPROCESSING, LABEL_MAP)

    def test_resampled(self, tmp_path: Path) -> None:
        scan = read_image(write(tmp_path / "scan.nii", torso()))
        preprocessing = Preprocessing((-1000.0, 2000.0), spacing=(0.5, 2 / 3, 1.0), margin=0.0)
        labels = predict_scan(Nearest(), scan, preprocessing, LABEL_MAP)
        np.testing.assert_array_equal(labels, expected(scan.array[0]))


class TestLargestComponents:
    def test_one_part_of_each_class_is_kept(self) -> None:
        classes = np.zeros((10, 10, 10), np.uint8)
        classes[1:5, 1:5, 1:5] = 1
        classes[5, 5, 5] = 1  # touches at a corner
        classes[8, 8, 8] = 1
        classes[1:3, 7:9, 1:3] = 3
        classes[9, 0, 9] = 3
        kept = keep_largest_components(classes)
        wanted = classes.copy()
        wanted[8, 8, 8] = wanted[9, 0, 9] = 0
        assert kept.dtype == np.uint8
        np.testing.assert_array_equal(kept, wanted)

    def test_organs_in_each_others_boxes(self) -> None:
        classes = np.ones((5, 5, 5), np.int16)
        classes[2, 2, 2] = 300
        np.testing.assert_array_equal(keep_largest_components(classes), classes)

    def test_nothing(self) -> None:
        assert not keep_largest_components(np.zeros((3, 3, 3), np.uint8)).any()

    def test_in_a_prediction(self, tmp_path: Path) -> None:
        array = torso()
        array[10, 9, 7] = 2000
        scan = read_image(write(tmp_path / "scan.nii", array))
        labels = predict_scan(Nearest(), scan, PREPROCESSING, LABEL_MAP, largest_component=True)
        cleaned = expected(scan.array[0])
        cleaned[SHAPE[0] - 1 - 10, 9, 7] = 0
        np.testing.assert_array_equal(labels, cleaned)


class TestFiles:
    def test_a_file_to_a_file(self, tmp_path: Path, predictor: Predictor) -> None:
        source = write(tmp_path / "scan.nii.gz", torso().transpose(2, 0, 1), np.eye(4)[[1, 2, 0, 3]])
        (written,) = predict_files(predictor, source, tmp_path / "new" / "out.nii")
        assert written == tmp_path / "new" / "out.nii"
        before, after = nib.load(source), nib.load(written)
        np.testing.assert_array_equal(after.affine, before.affine)
        np.testing.assert_array_equal(np.asarray(after.dataobj), expected(np.asarray(before.dataobj)))
        assert "bone" in after.header.extensions[0].text

    def test_a_file_to_a_folder(self, tmp_path: Path, predictor: Predictor) -> None:
        told = []
        written = predict_files(
            predictor,
            write(tmp_path / "a_ct.nii.gz", torso()),
            tmp_path / "out",
            on_case=lambda path, scan, seconds: told.append((path, scan.grid.shape, seconds > 0)),
        )
        assert written == [tmp_path / "out" / "a.nii.gz"]
        assert told == [(tmp_path / "out" / "a.nii.gz", SHAPE, True)]

    def test_a_folder(self, tmp_path: Path, predictor: Predictor) -> None:
        for name in ("b_ct.nii.gz", "a.nii"):
            write(tmp_path / "scans" / name, torso())
        write(tmp_path / "scans" / "b_seg.nii.gz", torso())
        written = predict_files(predictor, tmp_path / "scans", tmp_path / "out")
        assert [path.name for path in written] == ["a.nii.gz", "b.nii.gz"]
        for path in written:
            np.testing.assert_array_equal(
                read_labels(path), expected(read_image(tmp_path / "scans" / "a.nii").array[0])
            )

    def test_channels_of_one_scan(self, tmp_path: Path) -> None:
        predictor = Predictor(Nearest(2), PREPROCESSING, LABEL_MAP)
        for channel in range(2):
            write(tmp_path / "scans" / f"x_000{channel}.nii.gz", torso())
        for source in (tmp_path / "scans", tmp_path / "scans" / "x_0000.nii.gz"):
            (written,) = predict_files(predictor, source, tmp_path / "out", overwrite=True)
            assert written.name == "x.nii.gz"

    def test_one_bad_scan_does_not_stop_the_others(self, tmp_path: Path, predictor: Predictor) -> None:
        for name in ("a", "c"):
            write(tmp_path / "scans" / f"{name}.nii.gz", torso())
        (tmp_path / "scans" / "b.nii.gz").write_text("no scan")
        with pytest.raises(InputError, match=r"^1 of 3 scans were not segmented: .*b\.nii\.gz: "):
            predict_files(predictor, tmp_path / "scans", tmp_path / "out")
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii.gz", "c.nii.gz"]

    def test_nothing_is_left_of_a_bad_scan(self, tmp_path: Path, predictor: Predictor) -> None:
        source = write(tmp_path / "air.nii.gz", np.full(SHAPE, -1000, np.int16))
        with pytest.raises(InputError, match=r"air\.nii\.gz: no body to crop to"):
            predict_files(predictor, source, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_existing_outputs_are_kept_unless_told(self, tmp_path: Path, predictor: Predictor) -> None:
        source = write(tmp_path / "a_ct.nii.gz", torso())
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a.nii.gz").write_text("drawn by hand")
        with pytest.raises(InputError, match=r"a\.nii\.gz: exists already; --overwrite replaces it, --"):
            predict_files(predictor, source, tmp_path / "out")
        assert (tmp_path / "out" / "a.nii.gz").read_text() == "drawn by hand"
        predict_files(predictor, source, tmp_path / "out", overwrite=True)
        assert read_labels(tmp_path / "out" / "a.nii.gz").max() == 300

    def test_digits_of_a_name_are_kept(self, tmp_path: Path, predictor: Predictor) -> None:
        for number in (1, 2):
            source = write(tmp_path / "scans" / f"amos_000{number}.nii.gz", torso())
            (written,) = predict_files(predictor, source, tmp_path / "one")
            assert written == tmp_path / "one" / source.name
        written = predict_files(predictor, source.parent, tmp_path / "all")
        assert [path.name for path in written] == ["amos_0001.nii.gz", "amos_0002.nii.gz"]

    def test_clashes_are_refused_before_anything_runs(self, tmp_path: Path, predictor: Predictor) -> None:
        for name in ("a.nii.gz", "b.nii.gz", "b_ct.nii"):
            write(tmp_path / "scans" / name, torso())
        with pytest.raises(InputError, match=r"case 'b': b\.nii\.gz and b_ct\.nii"):
            predict_files(predictor, tmp_path / "scans", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_links_and_files_in_other_formats_are_told(self, tmp_path: Path, predictor: Predictor) -> None:
        write(tmp_path / "scans" / "a.nii.gz", torso())
        (tmp_path / "scans" / "b.nii.gz").symlink_to("/mnt/nas/b.nii.gz")
        (tmp_path / "scans" / "c.nrrd").touch()
        with pytest.raises(InputError, match=r"^2 of 3 scans .*c\.nrrd.*b\.nii\.gz: a link to /mnt/nas/b"):
            predict_files(predictor, tmp_path / "scans", tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.nii.gz"]

    def test_names_in_capitals(self, tmp_path: Path, predictor: Predictor) -> None:
        source = write(tmp_path / "scan.nii.gz", torso()).rename(tmp_path / "SCAN.NII.GZ")
        (written,) = predict_files(predictor, source, tmp_path / "out")
        assert written.name == "SCAN.nii.gz"
        (written,) = predict_files(predictor, source, tmp_path / "OUT.NII")
        np.testing.assert_array_equal(read_labels(written), expected(read_image(source).array[0]))


class TestContinue:
    def scans(self, folder: Path) -> Path:
        for name in ("a", "b"):
            write(folder / f"{name}.nii.gz", torso())
        return folder

    def test_finished_ones_are_left(self, tmp_path: Path, predictor: Predictor) -> None:
        scans, said = self.scans(tmp_path / "scans"), []
        first, second = predict_files(predictor, scans, tmp_path / "out")
        time = first.stat().st_mtime_ns
        second.unlink()
        again = Predictor(Nearest(), PREPROCESSING, LABEL_MAP)
        assert predict_files(again, scans, tmp_path / "out", resume=True, say=said.append) == [second]
        assert first.stat().st_mtime_ns == time
        assert said == ["1 of 2 scans were segmented before"]
        assert predict_files(again, scans, tmp_path / "out", resume=True) == []

    def test_files_of_others_are_not_finished(self, tmp_path: Path, predictor: Predictor) -> None:
        """Another network, other settings, a scan that has changed, drawn by hand."""
        scans = self.scans(tmp_path / "scans")
        first, _ = predict_files(predictor, scans, tmp_path / "out")
        other = Nearest()
        with torch.no_grad():
            other.centres.add_(0.1)
        window = Preprocessing(window=(-900.0, 2000.0), margin=0.0)
        names = LabelMap(("background", "soft", "tooth"), LABEL_MAP.values)
        for changed in (
            Predictor(other, PREPROCESSING, LABEL_MAP),
            Predictor(Nearest(), window, LABEL_MAP),
            Predictor(Nearest(), PREPROCESSING, names),
            Predictor(Nearest(), PREPROCESSING, LABEL_MAP, largest_component=True),
        ):
            with pytest.raises(InputError, match=r"a\.nii\.gz: exists already; and not made of this scan"):
                predict_files(changed, scans, tmp_path / "out", resume=True)
        write(scans / "a.nii.gz", torso() + 1)
        with pytest.raises(InputError, match="not made of this scan"):
            predict_files(predictor, scans, tmp_path / "out", resume=True)
        for content in (b"", b"drawn by hand", (scans / "b.nii.gz").read_bytes()):
            first.write_bytes(content)
            with pytest.raises(InputError, match="not made of this scan"):
                predict_files(predictor, scans, tmp_path / "out", resume=True)
            assert first.read_bytes() == content


class TestTold:
    """Networks that were saved in Python."""

    def test_saved_with_all_that_prediction_needs(self, tmp_path: Path) -> None:
        path, network = tmp_path / "x.safetensors", effseg.EffSegNet(1, 3, preset="tiny")
        network.save(path, preprocessing=PREPROCESSING, labels=LABEL_MAP, patch_size=(64, 32, 16))
        predictor = load_predictor(path)
        assert (predictor.preprocessing, predictor.label_map) == (PREPROCESSING, LABEL_MAP)
        assert predictor.patch_size == (64, 32, 16)
        network.save(path, labels=["liver", "spleen"])
        assert load_predictor(path).label_map.names == ("background", "liver", "spleen")

    @pytest.mark.parametrize(
        ("labels", "expected"),
        [
            (["liver", "spleen"], LabelMap(("background", "liver", "spleen"), (0, 1, 2))),
            (["air", "liver", "spleen"], LabelMap(("air", "liver", "spleen"), (0, 1, 2))),
            ({5: "spleen", 1: "liver"}, LabelMap(("background", "liver", "spleen"), (0, 1, 5))),
        ],
    )
    def test_told_when_it_is_loaded(self, tmp_path: Path, labels: object, expected: LabelMap) -> None:
        path = tmp_path / "x.safetensors"
        effseg.EffSegNet(1, 3, preset="tiny").save(path)
        with pytest.raises(InputError, match=r"without the preprocessing .* --window, --spacing and --crop"):
            load_predictor(path, labels=labels)
        with pytest.raises(InputError, match=r"without the labels .* tell them with --labels"):
            load_predictor(path, preprocessing=PREPROCESSING)
        predictor = load_predictor(path, preprocessing=PREPROCESSING, labels=labels, patch_size=(8, 8, 8))
        assert (predictor.preprocessing, predictor.label_map) == (PREPROCESSING, expected)
        assert predictor.patch_size == (8, 8, 8)

    @pytest.mark.parametrize(
        "labels", [["liver"], {1: "a", 2: "b", 3: "c"}, ["a", "b", "c", "d"], "liver", ["a", "b", "c"]]
    )
    def test_labels_of_another_number(self, tmp_path: Path, labels: object) -> None:
        with pytest.raises(InputError, match="labels: expected"):
            effseg.EffSegNet(1, 3, preset="tiny").save(tmp_path / "x.safetensors", labels=labels)
        assert not list(tmp_path.iterdir())

    def test_a_trained_network_is_told_nothing_else(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        effseg.EffSegNet(1, 3, preset="tiny").save(path, preprocessing=PREPROCESSING, labels=LABEL_MAP)
        assert load_predictor(path, preprocessing=PREPROCESSING, labels=LABEL_MAP).label_map == LABEL_MAP
        with pytest.raises(InputError, match=r"preprocessing: the network was trained with .* leave --w"):
            load_predictor(path, preprocessing=Preprocessing())
        with pytest.raises(InputError, match="labels: the network was trained with"):
            load_predictor(path, labels=["a", "b"])


class TestGuarded:
    @pytest.mark.parametrize("output", ["scans", "scans/a.nii.gz"])
    def test_a_scan_is_never_overwritten(self, tmp_path: Path, predictor: Predictor, output: str) -> None:
        source = write(tmp_path / "scans" / "a.nii.gz", torso())
        with pytest.raises(InputError, match=r"a\.nii\.gz: is a scan to segment; choose another output"):
            predict_files(predictor, source, tmp_path / output, overwrite=True)

    def test_outputs_that_cannot_be(self, tmp_path: Path, predictor: Predictor) -> None:
        source = write(tmp_path / "scans" / "a.nii.gz", torso())
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match=r"out\.nii\.gz: expected a folder, for the scans of .*scans"):
            predict_files(predictor, source.parent, tmp_path / "out.nii.gz")
        with pytest.raises(InputError, match="file: expected a folder or a name that ends in"):
            predict_files(predictor, source, tmp_path / "file")
        with pytest.raises(InputError, match="file is no folder that may be written to"):
            predict_files(predictor, source, tmp_path / "file" / "out")


class TestCheckpoint:
    EXTRA = {  # noqa: RUF012
        "preprocessing": PREPROCESSING.to_dict(),
        "labels": LABEL_MAP.to_dict(),
        "training": {"patch_size": None},
    }

    def save(self, path: Path, num_classes: int = 3, **changes: object) -> Path:
        torch.manual_seed(0)
        network = effseg.EffSegNet(1, num_classes)
        network.save(path, extra={**self.EXTRA, **changes})
        return path

    def test_a_file(self, tmp_path: Path) -> None:
        path = self.save(tmp_path / "x.safetensors", training={"patch_size": [64, 32, 16]})
        predictor = load_predictor(path, bf16=True)
        assert predictor.preprocessing == PREPROCESSING
        assert predictor.label_map == LABEL_MAP
        assert predictor.patch_size == (64, 32, 16)
        assert predictor.bf16
        assert not predictor.model.training

    def test_a_run_folder_gives_its_best_network_or_else_its_last(self, tmp_path: Path) -> None:
        self.save(tmp_path / "final.safetensors", labels=LABEL_MAP.to_dict() | {"ignore": 1})
        assert load_predictor(tmp_path).label_map.ignore == 1
        self.save(tmp_path / "best.safetensors", labels=LABEL_MAP.to_dict() | {"ignore": 2})
        assert load_predictor(tmp_path).label_map.ignore == 2

    def test_a_network_segments_a_scan_from_its_checkpoint(self, tmp_path: Path) -> None:
        """The whole way with a real network: its labels are those of its logits on the cropped scan."""
        predictor = load_predictor(self.save(tmp_path / "x.safetensors"))
        source = write(tmp_path / "scan.nii.gz", torso())
        (written,) = predict_files(predictor, source, tmp_path / "out")
        scan = read_image(source)
        prepared = PREPROCESSING.prepare(scan)
        with torch.no_grad():
            logits = predictor.model(PREPROCESSING.normalise(prepared.image)[None])
        classes = logits.argmax(1)[0].numpy()
        assert len(np.unique(classes)) > 1
        reference = np.zeros(SHAPE, np.uint16)
        reference[prepared.box] = np.array([0, 4, 300])[classes]
        np.testing.assert_array_equal(read_labels(written, scan), reference)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"preprocessing": None}, "without the preprocessing that prediction needs"),
            ({"labels": 3}, "without the labels that prediction needs"),
            ({"training": {"patch_size": [1, 2]}}, "patch_size: expected three sizes"),
            ({"preprocessing": {"window": [1, 0]}}, "preprocessing: expected crop, margin"),
            ({"labels": {"names": ["background"], "values": [0]}}, "label map: no foreground"),
            ({"num_classes": 5}, "the network has 5 classes, its label map 3"),
        ],
    )
    def test_parts_that_do_not_fit(self, tmp_path: Path, changes: dict, message: str) -> None:
        path = self.save(tmp_path / "x.safetensors", **changes)
        with pytest.raises(InputError, match=message) as caught:
            load_predictor(path)
        assert str(path) in str(caught.value)

    def test_what_is_no_checkpoint(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        with pytest.raises(InputError, match="absent: no such checkpoint or run folder"):
            load_predictor(tmp_path / "absent")
        with pytest.raises(InputError, match=r"a folder without best\.safetensors or final\.safetensors"):
            load_predictor(tmp_path)
        (tmp_path / "text.safetensors").write_text("no weights")
        with pytest.raises(InputError, match=r"text\.safetensors: not a readable checkpoint"):
            load_predictor(tmp_path / "text.safetensors")
        save_file({"weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
        with pytest.raises(InputError, match=r"foreign\.safetensors: .* not a checkpoint of effseg"):
            load_predictor(tmp_path / "foreign.safetensors")
        whole = self.save(tmp_path / "cut.safetensors").read_bytes()
        (tmp_path / "cut.safetensors").write_bytes(whole[:-1000])
        with pytest.raises(InputError, match=r"cut\.safetensors: not a readable checkpoint"):
            load_predictor(tmp_path / "cut.safetensors")
