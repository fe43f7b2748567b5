"""Selections of cases, and nnU-Net's splits."""

import json
from pathlib import Path

import pytest

from effseg.data.cases import Case, select_cases
from effseg.data.selection import selects_by_name
from effseg.data.splits import fold_names, split_cases
from effseg.errors import InputError


def named(count: int) -> list[Case]:
    return [Case(f"case{index:03d}", (Path(f"case{index:03d}.nii.gz"),)) for index in range(count)]


def names(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]


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
