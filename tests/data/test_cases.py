"""Cases of a folder, and what of them is missing."""

import json
import os
from pathlib import Path

import pytest

from effseg.data.cases import Case, case_of, find_cases, look_for_cases
from effseg.data.dataset_json import read_dataset_json
from effseg.data.description import description_file
from effseg.errors import InputError
from effseg.training import TrainingConfig
from effseg.training.data import split


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def describe(folder: Path, **entries: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


def names(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]


class TestFind:
    def test_nnunet(self, tmp_path: Path) -> None:
        touch(tmp_path, "imagesTr/b_0000.nii.gz", "imagesTr/b_0001.nii.gz", "imagesTr/a.x_0000.nii.gz",
              "imagesTr/a.x_0001.nii.gz", "labelsTr/a.x.nii.gz", "labelsTr/b.nii.gz", "labelsTr/notes.txt",
              "imagesTr/._b_0000.nii.gz", "imagesTr/Thumbs.db")  # fmt: skip
        first, second = find_cases(tmp_path, labelled=True)
        images = tmp_path / "imagesTr"
        assert first.name == "a.x"
        assert second == Case(
            "b", (images / "b_0000.nii.gz", images / "b_0001.nii.gz"), tmp_path / "labelsTr" / "b.nii.gz"
        )

    def test_pairs(self, tmp_path: Path) -> None:
        touch(tmp_path, "b_ct.nii.gz", "b_seg.nii.gz", "a_ct.NII", "a_seg.nii.gz", "b.nii.gz", "README.md")
        assert find_cases(tmp_path, labelled=True) == [
            Case("a", (tmp_path / "a_ct.NII",), tmp_path / "a_seg.nii.gz"),
            Case("b", (tmp_path / "b_ct.nii.gz",), tmp_path / "b_seg.nii.gz"),
        ]

    @pytest.mark.parametrize(
        ("files", "expected"),
        [
            (("imagesTs/a_0000.nii.gz", "imagesTr/b_0000.nii.gz"), [("a", 1)]),
            (("imagesTr/b_0000.nii.gz", "imagesTr/b_0001.nii.gz"), [("b", 2)]),
            (("b_0000.nii.gz", "b_0001.nii.gz", "a_0000.nii.gz", "a_0001.nii.gz"), [("a", 2), ("b", 2)]),
            (("b_ct.nii.gz", "b_seg.nii.gz", "a_ct.nii.gz"), [("a", 1), ("b", 1)]),
            (("scan 1.nii.gz", "b_ct.nii", "c_0000.nii.gz"), [("b", 1), ("c", 1), ("scan 1", 1)]),
            (
                ("amos_0001.nii.gz", "amos_0002.nii.gz", "s0003.nii.gz"),
                [("amos_0001", 1), ("amos_0002", 1), ("s0003", 1)],
            ),
            (("a_0001.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz"), [("a_0001", 1), ("b", 2)]),
            (("case_1_0000.NII.GZ", "case_2_0000.nii"), [("case_1", 1), ("case_2", 1)]),
        ],
    )
    def test_scans_to_segment(self, tmp_path: Path, files: tuple[str, ...], expected: list) -> None:
        cases = find_cases(touch(tmp_path, *files), labelled=False)
        assert [(case.name, len(case.images)) for case in cases] == expected
        assert all(case.labels is None for case in cases)

    @pytest.mark.parametrize(
        ("files", "labelled", "message"),
        [
            ((), True, "no cases: expected imagesTr"),
            ((), False, "no cases: expected NIfTI files"),
            (("README.md", "a_seg.nii.gz"), False, "no cases: expected NIfTI files"),
            (("a_seg.nii.gz",), True, "no cases: expected imagesTr"),
            (("imagesTr/x",), True, "no cases: expected imagesTr"),
            (("a_ct.nii.gz",), True, r"a_ct\.nii\.gz: its labels are missing: expected .*a_seg\.nii\.gz"),
            (("imagesTr/a_0000.nii.gz",), True, r"its labels are missing: expected .*labelsTr/a\.nii\.gz"),
            (
                ("imagesTr/a.nii.gz",),
                True,
                "expected a name with its channel, .* or its labels are",
            ),
            (("imagesTr/a_0000.nii.gz", "imagesTr/a_0002.nii.gz"), True, "'a' has the channels 0000, 0002"),
            (("imagesTr/a_0001.nii.gz",), True, r"its labels are missing: expected .*a_0001\.nii\.gz"),
            (
                ("imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz"),
                True,
                "'a' has the channels 0001, expected 0000",
            ),
            (
                ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "labelsTr/b.nii.gz"),
                True,
                r"b\.nii\.gz: the scan of these labels is missing: expected .*b_0000\.nii\.gz",
            ),
            (("a_ct.nii.gz", "a_seg.nii.gz", "b_ct.nrrd"), True, r"b_ct\.nrrd: \.nrrd files are not read"),
            (
                ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "imagesTr/b_0000.mha"),
                True,
                r"\.mha files are not",
            ),
            (
                ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "labelsTr/a.nii"),
                True,
                "more than one file would be",
            ),
            (("imagesTr/a_0000.nii.gz", "imagesTr/a_0000.nii"), True, "more than one scan would be case 'a'"),
            (("a_0000.nii.gz", "a.nii.gz"), False, r"case 'a': a\.nii\.gz and a_0000\.nii\.gz"),
            (("a_0000.nii.gz", "a_0000.NII"), False, "more than one scan would be case 'a'"),
            (("ä.nii.gz", "a\u0308.nii"), False, "more than one scan would be case"),
            (("a_0000.nii.gz", "a_0002.nii.gz"), False, "'a' has the channels 0000, 0002, expected 0000 on"),
            (("a.nrrd", "b.mha"), False, r"a\.nrrd: \.nrrd files are not read, only \.nii\.gz or \.nii"),
            (("inside/a.nii.gz",), False, "folders inside, as inside, are not looked into"),
            (("a.nii.gz", "a.nii"), False, "more than one scan would be case 'a'"),
            (("a_ct.nii.gz", "a.nii"), False, "more than one scan would be case 'a'"),
        ],
    )
    def test_refused(self, tmp_path: Path, files: tuple[str, ...], labelled: bool, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            find_cases(touch(tmp_path, *files), labelled=labelled)
        assert str(tmp_path) in str(caught.value)

    def test_labels_of_pairs_may_be_alone(self, tmp_path: Path) -> None:
        """find_cases leaves them; training asks for their scans, unless it is told its cases."""
        found = look_for_cases(touch(tmp_path, "a_ct.nii.gz", "a_seg.nii.gz", "b_seg.nii.gz"), labelled=True)
        assert "the scan of these labels is missing" in found.unpaired["b"]
        assert names(find_cases(tmp_path, labelled=True)) == ["a"]
        config = TrainingConfig(data=tmp_path, output=tmp_path / "run", fold="all")
        with pytest.raises(InputError, match=r"b_seg\.nii\.gz: the scan of these labels is missing"):
            split(config)
        for changes in ({"cases": "a"}, {"allow_missing": True}):
            assert names(split(config.replace(**changes))[0]) == ["a"]

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="absent: no such folder"):
            find_cases(tmp_path / "absent", labelled=True)
        touch(tmp_path, "file")
        with pytest.raises(InputError, match="file: expected a folder"):
            find_cases(tmp_path / "file", labelled=True)

    def test_one_file(self, tmp_path: Path) -> None:
        touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b_ct.nii.gz", "c.nii", "c.nii.gz", "d_0001.nii")
        both = tmp_path / "a_0000.nii.gz", tmp_path / "a_0001.nii.gz"
        assert case_of(both[0]) == case_of(both[1]) == Case("a", both)
        assert case_of(tmp_path / "b_ct.nii.gz") == Case("b", (tmp_path / "b_ct.nii.gz",))
        assert case_of(tmp_path / "c.nii") == Case("c", (tmp_path / "c.nii",))
        assert case_of(tmp_path / "d_0001.nii").name == "d_0001"
        touch(tmp_path, "a_0003.nii.gz")
        with pytest.raises(InputError, match="'a' has the channels 0000, 0001, 0003, expected 0000 on"):
            case_of(both[0])


class TestDescribed:
    """What dataset.json says counts."""

    CT, CT_PET = {"0": "CT"}, {"0": "CT", "1": "PET"}

    def test_digits_are_a_channel(self, tmp_path: Path) -> None:
        touch(describe(tmp_path, channel_names=self.CT), "a_0001_0000.nii.gz", "imagesTs/b_0002.nii.gz")
        assert names(find_cases(touch(tmp_path / "x", "a_0001.nii.gz"), labelled=False)) == ["a_0001"]
        assert case_of(tmp_path / "a_0001_0000.nii.gz").name == "a_0001"
        with pytest.raises(InputError, match="'b' has the channels 0002, expected 0000 as in"):
            case_of(tmp_path / "imagesTs" / "b_0002.nii.gz")

    def test_cases_of_the_decathlon(self, tmp_path: Path) -> None:
        """No channel in the names, and digits that are none."""
        touch(describe(tmp_path, modality=self.CT, numTraining=2), "imagesTr/amos_0001.nii.gz",
              "imagesTr/liver.nii.gz", "labelsTr/amos_0001.nii.gz", "labelsTr/liver.nii.gz")  # fmt: skip
        assert names(find_cases(tmp_path, labelled=True)) == ["amos_0001", "liver"]

    def test_channels_without_files(self, tmp_path: Path) -> None:
        files = ("imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "imagesTr/b_0000.nii.gz")
        touch(describe(tmp_path, channel_names=self.CT_PET), *files, "labelsTr/a.nii.gz", "labelsTr/b.nii.gz")
        found = look_for_cases(tmp_path, labelled=True)
        assert names(found.cases) == ["a"]
        assert "'b' has the channels 0000, expected 0000, 0001 as in dataset.json" in found.missing["b"]
        describe(tmp_path, channel_names=self.CT)
        assert list(look_for_cases(tmp_path, labelled=True).missing) == ["a"]

    def test_fewer_cases_than_counted(self, tmp_path: Path) -> None:
        touch(describe(tmp_path, numTraining=3), "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
        with pytest.raises(InputError, match=r"dataset\.json: numTraining is 3, found 1 cases"):
            find_cases(tmp_path, labelled=True)
        describe(tmp_path, numTraining=1)
        assert names(find_cases(tmp_path, labelled=True)) == ["a"]

    def test_names_of_channels(self, tmp_path: Path) -> None:
        assert read_dataset_json(tmp_path).channels is None
        for entries, channels in (
            ({"channel_names": self.CT_PET}, ("CT", "PET")),
            ({"modality": {"0": "MR"}}, ("MR",)),
            ({"labels": {}}, None),
        ):
            assert read_dataset_json(describe(tmp_path, **entries)).channels == channels

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ({"file_ending": ".mha"}, r"file_ending: expected \.nii\.gz or \.nii, got '\.mha'"),
            ({"channel_names": {"1": "CT"}}, "channel_names: expected the numbers 0, 1, ..., got 1"),
            ({"channel_names": ["CT"]}, "channel_names: expected an object"),
            ({"numTraining": "many"}, "numTraining: expected a number, got 'many'"),
            ({"dataset": []}, r"dataset: expected an object of cases, got \[\]"),
            ({"dataset": {"a": {"images": "a.nii.gz", "label": "b.nii.gz"}}}, "'a': expected images, a list"),
            ({"dataset": {"a": {"images": ["a.nii.gz"]}}}, "'a': expected images, a list, and label"),
            ({"dataset": {"a/b": {"images": ["a.nii.gz"], "label": "b.nii.gz"}}}, "names .*, got 'a/b'"),
        ],
    )
    def test_unusable(self, tmp_path: Path, entries: dict, message: str) -> None:
        touch(describe(tmp_path, **entries), "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
        with pytest.raises(InputError, match=message):
            find_cases(tmp_path, labelled=True)

    def test_a_byte_order_mark(self, tmp_path: Path) -> None:
        touch(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
        text = json.dumps({"channel_names": self.CT, "file_ending": ".nii.gz"})
        (tmp_path / "dataset.json").write_text(text, encoding="utf-8-sig")
        assert names(find_cases(tmp_path, labelled=True)) == ["a"]


class TestListed:
    """dataset.json lists the files itself."""

    def write(self, folder: Path, **changes: object) -> Path:
        cases = {
            "b": {"images": ["$EFFSEG_STORE/1.nii.gz"], "label": "segmentations/b.nii.gz"},
            "a": {"images": [str(folder / "x" / "a.NII")], "label": "../there/segmentations/a.nii.gz"},
        }
        return describe(folder, channel_names={"0": "CT"}, numTraining=2, dataset=cases | changes)

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("EFFSEG_STORE", str(touch(tmp_path / "store", "1.nii.gz")))
        touch(tmp_path / "there", "segmentations/a.nii.gz", "segmentations/b.nii.gz", "x/a.NII")
        touch(tmp_path / "there", "imagesTr/c_0000.nii.gz", "labelsTr/c.nii.gz")  # not listed: not used
        return self.write(tmp_path / "there")

    def test_files(self, folder: Path) -> None:
        labels = folder / "segmentations"
        images = {"a": folder / "x" / "a.NII", "b": folder.parent / "store" / "1.nii.gz"}
        expected = [Case(name, (images[name],), labels / f"{name}.nii.gz") for name in "ab"]
        assert find_cases(folder, labelled=True) == expected
        assert find_cases(folder, labelled=False) == [Case(name, (images[name],)) for name in "ab"]
        touch(folder, "imagesTs/d_0000.nii.gz")
        assert names(find_cases(folder, labelled=False)) == ["d"]

    def test_a_folder_inside_has_its_own_files(self, folder: Path) -> None:
        touch(folder, "imagesTs/d_0000.nii.gz", "images_clinic/e_0000.nii.gz")
        for inside, name in (("imagesTr", "c"), ("imagesTs", "d"), ("images_clinic", "e")):
            assert names(find_cases(folder / inside, labelled=False)) == [name]

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({"images": ["x/a.NII"], "label": "gone.nii.gz"}, r"gone\.nii\.gz: no such file"),
            ({"images": ["x/a.nrrd"], "label": "x/a.NII"}, r"a\.nrrd: \.nrrd files are not read, only \.nii"),
            (
                {"images": ["x/a.NII", "x/a.NII"], "label": "x/a.NII"},
                "2 images of case 'b', expected 1",
            ),
        ],
    )
    def test_missing(self, folder: Path, files: dict, message: str) -> None:
        self.write(folder, b=files)
        assert names(look_for_cases(folder, labelled=True).cases) == ["a"]
        with pytest.raises(InputError, match=message):
            find_cases(folder, labelled=True)

    def test_fewer_than_counted(self, folder: Path) -> None:
        description = json.loads((folder / "dataset.json").read_text())
        describe(folder, **description | {"numTraining": 3})
        with pytest.raises(InputError, match="numTraining is 3, found 2 cases"):
            find_cases(folder, labelled=True)


class TestBroken:
    """Files that are there by name only."""

    def broken(self, path: Path, kind: str) -> str:
        path.unlink(missing_ok=True)
        if kind == "link":
            path.symlink_to("/mnt/nas/gone.nii.gz")
            return "a link to /mnt/nas/gone.nii.gz, which is not there"
        if kind == "loop":
            path.symlink_to(path)
            return "a link to"
        if kind == "folder":
            path.mkdir()
            return "a folder, expected a file"
        if kind == "pipe":
            os.mkfifo(path)
            return "no regular file"
        path.touch()
        return "an empty file"

    @pytest.mark.parametrize("kind", ["link", "loop", "folder", "pipe", "empty"])
    @pytest.mark.parametrize(
        "name", ["imagesTr/b_0000.nii.gz", "labelsTr/b.nii.gz", "b_ct.nii.gz", "b_seg.nii.gz"]
    )
    def test_a_case_is_missing(self, tmp_path: Path, kind: str, name: str) -> None:
        if "/" in name:
            files = [f"imagesTr/{case}_0000.nii.gz" for case in "ab"]
            touch(tmp_path, *files, *(f"labelsTr/{case}.nii.gz" for case in "ab"))
        else:
            touch(tmp_path, *(f"{case}_{part}.nii.gz" for case in "ab" for part in ("ct", "seg")))
        reason = self.broken(tmp_path / name, kind)
        found = look_for_cases(tmp_path, labelled=True)
        assert names(found.cases) == ["a"]
        assert found.missing["b"].startswith(f"{tmp_path / name}: {reason}")

    def test_scans_to_segment(self, tmp_path: Path) -> None:
        touch(tmp_path, "a.nii.gz")
        reason = self.broken(tmp_path / "b.nii.gz", "link")
        found = look_for_cases(tmp_path, labelled=False)
        assert (names(found.cases), found.missing) == (["a"], {"b": f"{tmp_path / 'b.nii.gz'}: {reason}"})

    @pytest.mark.parametrize("name", ["dataset.json", "imagesTs", "imagesTr"])
    def test_a_link_to_nowhere_is_not_nothing(self, tmp_path: Path, name: str) -> None:
        touch(tmp_path, "a.nii.gz", "b_ct.nii.gz", "b_seg.nii.gz", "labels.json")
        (tmp_path / name).symlink_to("/mnt/nas/gone")
        for labelled in (False,) if name == "imagesTs" else (False, True):
            with pytest.raises(InputError, match=f"{name}: a link to /mnt/nas/gone, which is not there"):
                find_cases(tmp_path, labelled=labelled)
        if name == "dataset.json":
            with pytest.raises(InputError, match="a link to /mnt/nas/gone"):
                description_file(tmp_path)

    def test_links_that_lead_somewhere_are_files(self, tmp_path: Path) -> None:
        touch(tmp_path, "store/1", "scans/x.txt")
        (tmp_path / "scans" / "a.nii.gz").symlink_to(tmp_path / "store" / "1")
        (tmp_path / "scans" / "b.nii.gz").hardlink_to(tmp_path / "store" / "1")
        assert names(find_cases(tmp_path / "scans", labelled=False)) == ["a", "b"]
