"""Networks from their files, and what those must say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from nearest import LABEL_MAP, PREPROCESSING, SHAPE, torso, write

import effseg
from effseg.data.labels import LabelMap
from effseg.data.nifti import read_image, read_labels
from effseg.data.preprocessing import Preprocessing
from effseg.errors import InputError
from effseg.inference import (
    load_predictor,
    predict_files,
)


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
            ({1: "liver", 5: "spleen"}, LabelMap(("background", "liver", "spleen"), (0, 1, 5))),
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
        "labels",
        [
            ["liver"],
            {1: "a", 2: "b", 3: "c"},
            {5: "b", 1: "a"},
            ["a", "b", "c", "d"],
            "liver",
            ["a", "b", "c"],
        ],
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
