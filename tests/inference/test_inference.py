"""Scans in any orientation to labels on their own grids."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nearest import LABEL_MAP, PREPROCESSING, SHAPE, Nearest, expected, torso, write

from effseg.data.nifti import read_image
from effseg.data.preprocessing import AIR, Preprocessing
from effseg.errors import InputError
from effseg.inference import Predictor, keep_largest_components, predict_scan, segment
from effseg.inference.segmentation import probabilities


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

    def test_patches_without_finite_logits(self) -> None:
        model = Nearest()
        with torch.no_grad():
            model.centres[1] = torch.inf
        with pytest.raises(InputError, match="the network gives logits that are not finite"):
            segment(model, torch.zeros(1, 1, 4, 4, 4), patch_size=(4, 4, 4))

    def test_around_a_smaller_volume_patches_show_what_is_outside(self, tmp_path: Path) -> None:
        """In the middle, as MONAI would have it."""
        seen: list[torch.Tensor] = []
        model = Nearest(2)
        model.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
        image = torch.rand(1, 2, 3, 4, 8)
        outside = (AIR, 7.0)
        found = segment(model, image, patch_size=(6, 8, 8), outside=outside)
        assert found.shape == (1, 3, 4, 8)
        expected = [F.pad(image[:, c], (0, 0, 2, 2, 1, 2), value=v) for c, v in enumerate(outside)]
        assert torch.equal(seen[0], torch.stack(expected, 1))
        probable = probabilities(model, image, patch_size=(6, 8, 8), outside=outside)
        np.testing.assert_array_equal(probable.argmax(0), found[0])
        segment(model, image, patch_size=(6, 8, 8))
        assert seen[-1][:, :, 0].unique() == AIR

    @pytest.mark.parametrize("spacing", [None, (3.0, 3.0, 3.0)])
    def test_outside_of_a_scan_without_a_window_is_its_lowest_value(self, tmp_path: Path, spacing) -> None:  # type: ignore[no-untyped-def]
        seen: list[torch.Tensor] = []
        model = Nearest()
        model.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
        scan = read_image(write(tmp_path / "scan.nii", torso()))
        how = {"preprocessing": Preprocessing(("noNorm",), spacing), "label_map": LABEL_MAP}
        predict_scan(model, scan, **how, patch_size=(32, 32, 32))
        Predictor(model, **how, patch_size=(32, 32, 32)).probabilities(scan)
        assert [float(image[0, 0, 0, 0, 0]) for image in seen] == pytest.approx([-1000.0, -1000.0])

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
