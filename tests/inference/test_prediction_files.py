"""Scans of a folder to label files: what is written, left and never overwritten."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nearest import LABEL_MAP, PREPROCESSING, SHAPE, Nearest, expected, torso, write

from effseg.data.labels import LabelMap
from effseg.data.nifti import read_image, read_labels
from effseg.data.preprocessing import Preprocessing
from effseg.errors import InputError
from effseg.inference import (
    Predictor,
    predict_files,
)


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(Nearest(), PREPROCESSING, LABEL_MAP)


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

    def test_a_scan_under_the_header_of_labels_is_a_scan(self, tmp_path: Path, predictor: Predictor) -> None:
        """As `nib.Nifti1Image(masked, labels.affine, labels.header)` makes it, stored in whatever type."""
        scans, told = tmp_path / "scans", []
        for name in ("a", "b", "c"):
            write(scans / f"{name}.nii.gz", torso())
        predict_files(predictor, scans / "c.nii.gz", scans / "done.nii.gz")
        labels = nib.load(scans / "done.nii.gz")
        for name, dtype in (("a", np.int16), ("b", np.uint8)):
            masked = nib.Nifti1Image(torso().astype(np.float32), labels.affine, labels.header)
            masked.set_data_dtype(dtype)  # uint8 is scaled by nibabel
            masked.to_filename(scans / f"{name}.nii.gz")
        written = predict_files(predictor, scans, tmp_path / "out", say=told.append)
        assert [path.name for path in written] == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
        assert told == ["no scans, but label files of effseg predict: done.nii.gz"]

    def test_no_scan_beside_is_overwritten(self, tmp_path: Path, predictor: Predictor) -> None:
        source = write(tmp_path / "a_ct.nii.gz", torso())
        other = write(tmp_path / "a.nii.gz", torso())
        with pytest.raises(InputError, match=r"a\.nii\.gz: lies among the scans and may be one"):
            predict_files(predictor, source, tmp_path, overwrite=True)
        np.testing.assert_array_equal(np.asarray(nib.load(other).dataobj), torso())
        other.unlink()
        for _ in range(2):
            predict_files(predictor, source, tmp_path, overwrite=True)

    def test_a_slice_of_any_orientation(self, tmp_path: Path, predictor: Predictor) -> None:
        """One sagittal slice, axes superior, anterior, left: torch takes no negative stride."""
        affine = np.array([[0, 0, -1.0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
        source = write(tmp_path / "a.nii.gz", torso()[:, :, 5:6], affine)
        for spacing in (None, (2.0, 2.0, 2.0)):
            one = Predictor(Nearest(), Preprocessing(crop="none", spacing=spacing), LABEL_MAP)
            (written,) = predict_files(one, source, tmp_path / "out", overwrite=True)
            assert nib.load(written).shape == (*SHAPE[:2], 1)

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
