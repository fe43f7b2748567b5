"""Cases of a folder, selections of them, and nnU-Net's splits."""

import json
from pathlib import Path

import pytest

from effseg.data.cases import Case, case_of, find_cases, select_cases, split_cases
from effseg.errors import InputError


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def named(count: int) -> list[Case]:
    return [Case(f"case{index:03d}", (Path(f"case{index:03d}.nii.gz"),)) for index in range(count)]


def names(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]


class TestFind:
    def test_nnunet(self, tmp_path: Path) -> None:
        touch(tmp_path, "imagesTr/b_0000.nii.gz", "imagesTr/b_0001.nii.gz", "imagesTr/a.x_0000.nii.gz",
              "imagesTr/a.x_0001.nii.gz", "labelsTr/a.x.nii.gz", "labelsTr/b.nii.gz", "labelsTr/c.nii.gz",
              "imagesTr/._b_0000.nii.gz", "dataset.json")  # fmt: skip
        first, second = find_cases(tmp_path, labelled=True)
        images = tmp_path / "imagesTr"
        assert first.name == "a.x"
        assert second == Case(
            "b", (images / "b_0000.nii.gz", images / "b_0001.nii.gz"), tmp_path / "labelsTr" / "b.nii.gz"
        )

    def test_pairs(self, tmp_path: Path) -> None:
        touch(
            tmp_path, "b_ct.nii.gz", "b_seg.nii.gz", "a_ct.nii", "a_seg.nii.gz", "c_seg.nii.gz", "README.md"
        )
        assert find_cases(tmp_path, labelled=True) == [
            Case("a", (tmp_path / "a_ct.nii",), tmp_path / "a_seg.nii.gz"),
            Case("b", (tmp_path / "b_ct.nii.gz",), tmp_path / "b_seg.nii.gz"),
        ]

    @pytest.mark.parametrize(
        ("files", "expected"),
        [
            (("imagesTs/a_0000.nii.gz", "imagesTr/b_0000.nii.gz"), [("a", 1)]),
            (("imagesTr/b_0000.nii.gz", "imagesTr/b_0001.nii.gz"), [("b", 2)]),
            (("b_0000.nii.gz", "b_0001.nii.gz", "a_0000.nii.gz", "a_0001.nii.gz"), [("a", 2), ("b", 2)]),
            (("b_ct.nii.gz", "b_seg.nii.gz", "a_ct.nii.gz"), [("a", 1), ("b", 1)]),
            (("scan 1.nii.gz", "b_ct.nii", "c_0000.nii.gz"), [("b", 1), ("c_0000", 1), ("scan 1", 1)]),
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
            (("imagesTr/a.nii.gz",), True, "expected a name with its channel"),
            (("imagesTr/a_0000.nii.gz", "imagesTr/a_0002.nii.gz"), True, "'a' has the channels 0000, 0002"),
            (("imagesTr/a_0001.nii.gz",), True, "'a' has the channels 0001, expected 0000 on"),
            (("a.nii.gz", "a.nii"), False, "more than one scan would be case 'a'"),
            (("a_ct.nii.gz", "a.nii"), False, "more than one scan would be case 'a'"),
        ],
    )
    def test_refused(self, tmp_path: Path, files: tuple[str, ...], labelled: bool, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            find_cases(touch(tmp_path, *files), labelled=labelled)
        assert str(tmp_path) in str(caught.value)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="absent: no such folder"):
            find_cases(tmp_path / "absent", labelled=True)
        touch(tmp_path, "file")
        with pytest.raises(InputError, match="file: expected a folder"):
            find_cases(tmp_path / "file", labelled=True)

    def test_one_file(self, tmp_path: Path) -> None:
        touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "a_0003.nii.gz", "b_ct.nii.gz", "c.nii")
        both = tmp_path / "a_0000.nii.gz", tmp_path / "a_0001.nii.gz"
        assert case_of(both[0]) == case_of(both[1]) == Case("a", both)
        assert case_of(tmp_path / "a_0003.nii.gz") == Case("a", (tmp_path / "a_0003.nii.gz",))
        assert case_of(tmp_path / "b_ct.nii.gz") == Case("b", (tmp_path / "b_ct.nii.gz",))
        assert case_of(tmp_path / "c.nii").name == "c"


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

    @pytest.mark.parametrize("text", ["[", "[1]", '[{"train": []}]'])
    def test_malformed(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "splits_final.json").write_text(text)
        with pytest.raises(InputError, match=r"splits_final\.json: expected a list of objects"):
            split_cases(tmp_path, named(6), 0)
