"""Label maps: from JSON files, by selection, to classes and back."""

import json
from pathlib import Path

import numpy as np
import pytest

from effseg.data.labels import LabelMap, load_label_map
from effseg.errors import InputError, InputWarning

GROUPS = {
    "head": {"1": "Brainstem", "5": "LeftParotid", "300": "RightParotid"},
    "chest": {"1": "lung_right", "2": "lung_left"},
}


def write(folder: Path, name: str, entries: object) -> Path:
    (folder / name).write_text(json.dumps(entries))
    return folder


class TestLoad:
    def test_nnunet(self, tmp_path: Path) -> None:
        labels = {"background": 0, "spleen": 3, "liver": 1, "ignore": 9}
        label_map = load_label_map(write(tmp_path, "dataset.json", {"labels": labels}))
        assert label_map == LabelMap(("background", "liver", "spleen"), (0, 1, 3), ignore=9)

    def test_values_to_names(self, tmp_path: Path) -> None:
        label_map = load_label_map(write(tmp_path, "labels.json", {"0": "air", "2": "liver", "1": "spleen"}))
        assert label_map == LabelMap(("background", "spleen", "liver"), (0, 1, 2))

    @pytest.mark.parametrize(
        ("selection", "names", "values", "left_out"),
        [
            ("head", ("Brainstem", "LeftParotid", "RightParotid"), (1, 5, 300), ()),
            ("head:RightParotid, Brainstem", ("Brainstem", "RightParotid"), (1, 300), (5,)),
            ("lung_left", ("lung_left",), (2,), (1,)),
        ],
    )
    def test_groups(
        self, tmp_path: Path, selection: str, names: tuple[str, ...], values: tuple[int, ...], left_out: tuple
    ) -> None:
        label_map = load_label_map(write(tmp_path, "labels.json", GROUPS), selection)
        assert label_map == LabelMap(("background", *names), (0, *values), None, left_out)

    def test_one_group_needs_no_selection(self, tmp_path: Path) -> None:
        label_map = load_label_map(write(tmp_path, "labels.json", {"chest": GROUPS["chest"]}))
        assert label_map.names == ("background", "lung_right", "lung_left")

    def test_organs_of_a_dataset(self, tmp_path: Path) -> None:
        labels = {"background": 0, "spleen": 1, "liver": 2, "ignore": 3}
        label_map = load_label_map(write(tmp_path, "dataset.json", {"labels": labels}), "liver")
        assert label_map == LabelMap(("background", "liver"), (0, 2), ignore=3, left_out=(1,))

    @pytest.mark.parametrize(
        ("name", "entries", "selection", "message"),
        [
            ("labels.json", GROUPS, None, "several groups of labels; choose one of chest, head"),
            ("labels.json", GROUPS, "abdomen:liver", "no group of labels 'abdomen'; there are chest, head"),
            ("labels.json", GROUPS, "head:liver", "no label liver; there are Brainstem"),
            ("labels.json", GROUPS, "liver", "no group has the label liver; there are Brainstem"),
            ("labels.json", GROUPS, "Brainstem,lung_left", "no group has the label Brainstem, lung_left"),
            ("labels.json", {"0": "background"}, None, "no foreground"),
            ("labels.json", {"0": "liver", "1": "spleen"}, "liver,spleen", "liver has the value 0, which is"),
            ("labels.json", {}, None, "no foreground"),
            ("dataset.json", {"labels": {"background": 0}}, None, "no foreground"),
            ("dataset.json", {"labels": {"background": 0, "ignore": 1}}, None, "no foreground"),
            ("dataset.json", {"name": "x"}, None, "expected labels as an object"),
            ("dataset.json", [1], None, "expected labels as an object"),
            ("dataset.json", {"labels": {"background": 0, "a": [1, 2]}}, None, "one whole number a label"),
            ("dataset.json", {"labels": {"background": 0, "a": 1, "b": 1}}, None, "distinct values"),
            ("dataset.json", {"labels": {"background": 0, "a": -1}}, None, "from 0 to 65535"),
            ("labels.json", {"1": "a", "2": "a"}, None, "distinct names of labels, found a, a"),
            ("dataset.json", {"labels": {"ignore": 0, "a": 1}}, None, "0 must be the background"),
        ],
    )
    def test_refused(
        self, tmp_path: Path, name: str, entries: object, selection: str | None, message: str
    ) -> None:
        with pytest.raises(InputError, match=message) as caught:
            load_label_map(write(tmp_path, name, entries), selection)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"expected a dataset\.json or labels\.json"):
            load_label_map(tmp_path)

    def test_no_json(self, tmp_path: Path) -> None:
        (tmp_path / "labels.json").write_text("{")
        with pytest.raises(InputError, match=r"labels\.json: not readable as JSON"):
            load_label_map(tmp_path)


def test_an_organ_of_the_value_0_is_told(tmp_path: Path) -> None:
    """As where numbers begin at 0 and the background was forgotten."""
    folder = write(tmp_path, "labels.json", {"0": "liver", "1": "spleen"})
    with pytest.warns(InputWarning, match="label 'liver' has the value 0, which is the background's"):
        assert load_label_map(folder).names == ("background", "spleen")


class TestClasses:
    LABEL_MAP = LabelMap(("background", "a", "b"), (0, 7, 300), ignore=9, left_out=(4,))

    def test_there_and_back(self) -> None:
        values = np.array([[0, 7], [300, 7]], np.uint16)
        classes = self.LABEL_MAP.to_classes(values)
        assert classes.dtype == np.uint8
        np.testing.assert_array_equal(classes, [[0, 1], [2, 1]])
        back = self.LABEL_MAP.to_values(classes)
        assert back.dtype == np.uint16
        np.testing.assert_array_equal(back, values)

    def test_left_out_is_background_and_ignore_is_the_last_number(self) -> None:
        classes = self.LABEL_MAP.to_classes(np.array([4, 9, 0], np.int64))
        np.testing.assert_array_equal(classes, [0, 255, 0])
        assert self.LABEL_MAP.ignore_index == 255
        np.testing.assert_array_equal(self.LABEL_MAP.to_values(classes), [0, 9, 0])

    @pytest.mark.parametrize(("found", "dtype"), [(3, np.uint8), (254, np.uint8), (-1, np.int16)])
    def test_numbers_that_are_no_class(self, found: int, dtype: type) -> None:
        with pytest.raises(InputError, match=f"classes: expected 0 to 2, found {found}"):
            self.LABEL_MAP.to_values(np.array([[0, 1], [2, found]], dtype))

    @pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint16])
    def test_unknown_values_are_named(self, dtype: type) -> None:
        values = np.zeros((40, 2, 2), dtype)
        values[37, 1, 0] = 8
        with pytest.raises(
            InputError, match=r"case\.nii\.gz: label value 8 is not in the label map \(0 backg"
        ):
            self.LABEL_MAP.to_classes(values, Path("case.nii.gz"))

    @pytest.mark.parametrize("value", [-1, 65536])
    def test_values_out_of_range(self, value: int) -> None:
        with pytest.raises(InputError, match="labels: expected label values from 0 to 65535"):
            self.LABEL_MAP.to_classes(np.array([value]))

    @pytest.mark.parametrize(
        ("organs", "ignore", "dtype"),
        [(255, None, np.uint8), (256, None, np.int16), (254, 500, np.uint8), (255, 500, np.int16)],
    )
    def test_many_classes(self, organs: int, ignore: int | None, dtype: type) -> None:
        names = ("background", *(f"organ {index}" for index in range(organs)))
        label_map = LabelMap(names, tuple(range(organs + 1)), ignore)
        values = np.arange(organs + 1)
        classes = label_map.to_classes(values)
        assert classes.dtype == dtype
        np.testing.assert_array_equal(label_map.to_values(classes), values)
        if ignore is not None:
            assert label_map.to_classes(np.array([ignore]))[0] == label_map.ignore_index > organs

    def test_through_json(self) -> None:
        assert LabelMap.from_dict(json.loads(json.dumps(self.LABEL_MAP.to_dict()))) == self.LABEL_MAP

    @pytest.mark.parametrize("entries", [{}, {"names": 3, "values": [0]}, {"names": ["a"], "values": ["x"]}])
    def test_malformed_entries(self, entries: dict) -> None:
        with pytest.raises(InputError, match="label map: expected names and values"):
            LabelMap.from_dict(entries)
