"""Cases of a folder, selections of them, and nnU-Net's splits."""

import json
import os
from pathlib import Path

import pytest

from effseg.data.cases import (
    Case,
    case_of,
    find_cases,
    fold_names,
    look_for_cases,
    select_cases,
    selects_by_name,
    split_cases,
)
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


def named(count: int) -> list[Case]:
    return [Case(f"case{index:03d}", (Path(f"case{index:03d}.nii.gz"),)) for index in range(count)]


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

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ({"file_ending": ".mha"}, r"file_ending: expected \.nii\.gz or \.nii, got '\.mha'"),
            ({"channel_names": {"1": "CT"}}, "channel_names: expected the numbers 0, 1, ..., got 1"),
            ({"channel_names": ["CT"]}, "channel_names: expected an object"),
            ({"numTraining": "many"}, "numTraining: expected a number, got 'many'"),
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

    def test_links_that_lead_somewhere_are_files(self, tmp_path: Path) -> None:
        touch(tmp_path, "store/1", "scans/x.txt")
        (tmp_path / "scans" / "a.nii.gz").symlink_to(tmp_path / "store" / "1")
        (tmp_path / "scans" / "b.nii.gz").hardlink_to(tmp_path / "store" / "1")
        assert names(find_cases(tmp_path / "scans", labelled=False)) == ["a", "b"]


class TestSelect:
    CASES = (*named(4), Case("TCGA-CV-1", (Path(),)), Case("TCGA-CV-2", (Path(),)), Case("x-y", (Path(),)))

    @pytest.mark.parametrize(
        ("selection", "expected"),
        [
            (None, ["TCGA-CV-1", "TCGA-CV-2", "case000", "case001", "case002", "case003", "x-y"]),
            ("case001-case003", ["case001", "case002", "case003"]),
            (" case003 , case000,case003", ["case000", "case003"]),
            ("TCGA-CV-1-TCGA-CV-2,x-y", ["TCGA-CV-1", "TCGA-CV-2", "x-y"]),
            ("TCGA*,case00[12]", ["TCGA-CV-1", "TCGA-CV-2", "case001", "case002"]),
        ],
    )
    def test_terms(self, selection: str | None, expected: list[str]) -> None:
        assert names(select_cases(self.CASES, selection)) == expected

    def test_one_spelling_of_an_umlaut(self) -> None:
        assert names(select_cases([Case("fa\u0308lle", ())], "fälle")) == ["fa\u0308lle"]

    def test_selections_that_depend_on_no_other_case(self) -> None:
        known = [case.name for case in self.CASES]
        assert selects_by_name(known, "case001, x-y")
        for selection in (None, "case00*", "case000-case002", "case001,case009"):
            assert not selects_by_name(known, selection)

    @pytest.mark.parametrize("term", ["case004", "case000-case009", "case003-case001", "nothing*"])
    def test_unknown_terms(self, term: str) -> None:
        with pytest.raises(InputError, match="no case '"):
            select_cases(self.CASES, f"case001,{term}")

    @pytest.mark.parametrize("selection", ["", " , "])
    def test_nothing(self, selection: str) -> None:
        with pytest.raises(InputError, match="expected names of cases"):
            select_cases(self.CASES, selection)


class TestSplit:
    @pytest.mark.parametrize(
        ("count", "held_out"),
        [
            # As scikit-learn's KFold(5, shuffle=True, random_state=12345) gives them.
            (7, [[3, 6], [0, 4], [1], [5], [2]]),
            (16, [[0, 7, 8, 11], [3, 6, 12], [10, 14, 15], [1, 4, 9], [2, 5, 13]]),
            (20, [[3, 8, 13, 16], [0, 10, 12, 15], [6, 7, 11, 17], [9, 14, 18, 19], [1, 2, 4, 5]]),
        ],
    )
    def test_five_folds_are_nnunets(self, tmp_path: Path, count: int, held_out: list[list[int]]) -> None:
        cases = named(count)
        for fold, indices in enumerate(held_out):
            training, validation = split_cases(tmp_path, cases[::-1], fold)
            assert validation == [cases[index] for index in indices]
            assert training == [case for case in cases if case not in validation]

    def test_the_folders_own_splits(self, tmp_path: Path) -> None:
        splits = [
            {"train": ["case000", "other"], "val": ["case001"]},
            {"train": ["case001"], "val": ["case000"]},
        ]
        (tmp_path / "splits_final.json").write_text(json.dumps(splits))
        cases = named(2)
        assert split_cases(tmp_path, cases, 1) == ([cases[1]], [cases[0]])
        assert split_cases(tmp_path, cases, "0") == ([cases[0]], [cases[1]])
        with pytest.raises(InputError, match="fold: expected 0 to 1 or all, got 2"):
            split_cases(tmp_path, cases, 2)
        with pytest.raises(InputError, match="case 'case002' is in neither part of fold 0"):
            split_cases(tmp_path, named(3), 0)
        with pytest.raises(InputError, match="none of the cases is in the validation part"):
            split_cases(tmp_path, cases[:1], 0)

    def test_all(self, tmp_path: Path) -> None:
        assert split_cases(tmp_path, named(2), "all") == (named(2), named(2))

    @pytest.mark.parametrize("fold", [-1, 5, "first"])
    def test_no_such_fold(self, tmp_path: Path, fold: int | str) -> None:
        with pytest.raises(InputError, match=f"fold: expected 0 to 4 or all, got {fold}"):
            split_cases(tmp_path, named(6), fold)

    def test_too_few_cases(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="expected at least 5 cases for 5 folds, found 4"):
            split_cases(tmp_path, named(4), 0)

    def test_names_in_another_spelling(self, tmp_path: Path) -> None:
        splits = [{"train": ["fälle"], "val": ["case000"]}]
        (tmp_path / "splits_final.json").write_text(json.dumps(splits), encoding="utf-8-sig")
        assert fold_names(tmp_path, 0) == (["fälle"], ["case000"])
        cases = [*named(1), Case("fa\u0308lle", ())]
        assert split_cases(tmp_path, cases, 0) == (cases[1:], cases[:1])

    def test_a_link_that_leads_nowhere(self, tmp_path: Path) -> None:
        (tmp_path / "splits_final.json").symlink_to("/mnt/nas/splits_final.json")
        with pytest.raises(InputError, match="a link to /mnt/nas"):
            split_cases(tmp_path, named(6), 0)

    @pytest.mark.parametrize(
        "text", ["[", "[1]", '[{"train": []}]', '[{"train": "c", "val": []}]', '[{"train": [1], "val": [2]}]']
    )
    def test_malformed(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "splits_final.json").write_text(text)
        with pytest.raises(InputError, match=r"splits_final\.json: (expected a list|not readable)"):
            split_cases(tmp_path, named(6), 0)
