"""Crop, resampling, window, and the way back."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effseg.data.cases import find_cases
from effseg.data.grid import Grid
from effseg.data.nifti import Scan, read_image, read_labels
from effseg.data.preprocessing import AIR, Preprocessing
from effseg.data.resampling import resample_linear
from effseg.errors import InputError, InputWarning

SPACING = (1.0, 2.0, 3.0)


def scan_of(array: np.ndarray, spacing: tuple[float, float, float] = SPACING) -> Scan:
    header = nib.Nifti1Header()
    header.set_data_shape(array.shape)
    x, y, z = array.shape
    return Scan(array[None], Grid((x, y, z), np.diag([*spacing, 1.0]), header), (Path("scan.nii.gz"),))


def torso(shape: tuple[int, int, int] = (20, 18, 16)) -> np.ndarray:
    rng = np.random.default_rng(0)
    array = np.full(shape, -1000, np.int16)
    array[6:14, 5:12, 2:13] = rng.integers(-100, 300, (8, 7, 11))
    return array


class TestCrop:
    def test_margin_in_mm_and_voxels_kept(self) -> None:
        array = torso()
        prepared = Preprocessing(margin=2.5).prepare(scan_of(array))
        assert prepared.box == (slice(3, 17), slice(3, 14), slice(1, 14))
        assert prepared.image.dtype == np.int16
        assert prepared.image.flags.c_contiguous
        np.testing.assert_array_equal(prepared.image, array[None, 3:17, 3:14, 1:14])
        assert prepared.spacing == SPACING

    def test_none_keeps_everything(self) -> None:
        array = torso()
        prepared = Preprocessing(crop="none").prepare(scan_of(array))
        np.testing.assert_array_equal(prepared.image[0], array)
        air = Preprocessing(crop="none").prepare(scan_of(np.full((4, 5, 6), -1000, np.int16)))
        assert air.image.shape == (1, 4, 5, 6)

    def test_a_scan_of_air_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"scan\.nii\.gz: no body .* above -500 HU \(highest: -900\)"):
            Preprocessing().prepare(scan_of(np.full((4, 5, 6), -900, np.int16)))

    def test_the_box_depends_on_the_scan_alone(self) -> None:
        """Window, spacing and labels change nothing about which part of the scan is seen."""
        scan = scan_of(torso())
        boxes = {
            str(Preprocessing(window=window, spacing=spacing).prepare(scan).box)
            for window in ((-200.0, 400.0), (-1000.0, 1000.0))
            for spacing in (None, (2.0, 2.0, 2.0))
        }
        assert len(boxes) == 1

    @settings(max_examples=40, deadline=None)
    @given(
        box=st.tuples(*[st.tuples(st.integers(0, 7), st.integers(1, 4))] * 3),
        margin=st.floats(0, 8),
        seed=st.integers(0, 100),
    )
    def test_labels_inside_the_crop_come_back_exactly(
        self, box: tuple[tuple[int, int], ...], margin: float, seed: int
    ) -> None:
        shape = (11, 11, 11)
        sides = tuple(slice(start, min(11, start + length)) for start, length in box)
        array = np.full(shape, -1000, np.int16)
        array[sides] = 40
        preprocessing = Preprocessing(margin=margin)
        prepared = preprocessing.prepare(scan_of(array))
        labels = np.zeros(shape, np.uint8)
        labels[sides] = np.random.default_rng(seed).integers(0, 255, labels[sides].shape)
        inside = preprocessing.prepare_labels(labels, prepared)
        assert inside.shape == prepared.image.shape[1:]
        np.testing.assert_array_equal(preprocessing.restore(inside, prepared), labels)

    def test_outside_of_the_crop_is_background(self) -> None:
        preprocessing = Preprocessing(margin=0)
        prepared = preprocessing.prepare(scan_of(torso()))
        restored = preprocessing.restore(np.ones(prepared.image.shape[1:], np.uint16), prepared)
        assert restored.dtype == np.uint16
        assert restored.sum() == 8 * 7 * 11
        assert restored[6:14, 5:12, 2:13].all()

    def test_wanted_voxels_are_never_cut(self) -> None:
        wanted = np.zeros((20, 18, 16), bool)
        wanted[18, 9, 15] = wanted[8, 8, 8] = True
        prepared = Preprocessing(margin=0).prepare(scan_of(torso()), wanted)
        assert prepared.box == (slice(6, 19), slice(5, 12), slice(2, 16))
        assert prepared.rescued == 1
        assert Preprocessing(crop="none").prepare(scan_of(torso()), wanted).rescued == 0

    @pytest.mark.parametrize("sizes", [(1e6, 1e6, 1e6), (1.0, 32768.0, 1.0), (1e-3, 9e-4, 1.0)])
    def test_absurd_voxel_sizes_are_refused(self, sizes: tuple[float, float, float]) -> None:
        scan = scan_of(torso(), sizes)
        with pytest.raises(InputError, match=r"voxels of .* would become .* voxels of 1 x 1 x 1 mm"):
            Preprocessing(spacing=(1.0, 1.0, 1.0)).prepare(scan)

    def test_wrong_shapes(self) -> None:
        preprocessing = Preprocessing()
        prepared = preprocessing.prepare(scan_of(torso()))
        with pytest.raises(ValueError, match="labels: expected shape"):
            preprocessing.prepare_labels(np.zeros((1, 2, 3), np.uint8), prepared)
        with pytest.raises(ValueError, match="labels: expected shape"):
            preprocessing.restore(np.zeros((1, 2, 3), np.uint8), prepared)


class TestResampling:
    def test_shape_spacing_and_type(self) -> None:
        preprocessing = Preprocessing(crop="none", spacing=(2.0, 2.0, 1.5))
        prepared = preprocessing.prepare(scan_of(torso()))
        assert prepared.image.shape == (1, 10, 18, 32)
        assert prepared.image.dtype == np.int16
        assert prepared.spacing == (2.0, 2.0, 1.5)

    def test_the_spacing_it_has_changes_nothing(self) -> None:
        array = torso()
        prepared = Preprocessing(crop="none", spacing=SPACING).prepare(scan_of(array))
        np.testing.assert_array_equal(prepared.image[0], array)

    @pytest.mark.parametrize("wanted", [5, 10, 20, 33])
    def test_a_ramp_stays_in_place(self, wanted: int) -> None:
        """Values are HU at voxel centres: a linear ramp in mm must stay the same ramp."""
        centres = (np.arange(20) + 0.5) * 10
        image = np.broadcast_to(centres[None, :, None, None], (1, 20, 3, 4)).astype(np.float32)
        resampled = resample_linear(np.ascontiguousarray(image), (wanted, 3, 4))
        expected = (np.arange(wanted) + 0.5) * 200 / wanted
        inner = slice(wanted // 5 + 1, -wanted // 5 - 1)
        np.testing.assert_allclose(resampled[0, inner, 1, 2], expected[inner], rtol=1e-4)

    def test_every_axis_alike(self) -> None:
        image = np.random.default_rng(0).normal(size=(1, 6, 7, 8)).astype(np.float32)
        first = resample_linear(image, (9, 5, 8))
        turned = resample_linear(np.ascontiguousarray(image.transpose(0, 3, 1, 2)), (8, 9, 5))
        np.testing.assert_allclose(first, turned.transpose(0, 2, 3, 1), atol=1e-6)

    def test_labels_land_where_the_image_does(self) -> None:
        array = np.full((12, 12, 12), -1000, np.int16)
        array[4:8, 2:10, 3:9] = 1000
        preprocessing = Preprocessing(crop="none", spacing=(0.5, 1.0, 1.5))
        prepared = preprocessing.prepare(scan_of(array))
        labels = preprocessing.prepare_labels((array > 0).astype(np.uint8), prepared)
        np.testing.assert_array_equal(labels, prepared.image[0] > -200)  # the corners are blunter
        restored = preprocessing.restore(labels, prepared)
        np.testing.assert_array_equal(restored, array > 0)


class TestNormalise:
    def test_window(self) -> None:
        hu = np.array([-1000, -200, 100, 400, 3000], np.int16)
        normal = Preprocessing().normalise(hu)
        assert normal.dtype == torch.float32
        assert normal.tolist() == [-1.5, -1.5, 0.0, 1.5, 1.5]
        assert normal[0] == AIR
        np.testing.assert_array_equal(hu, [-1000, -200, 100, 400, 3000])

    def test_leaves_a_float_tensor_alone(self) -> None:
        image = torch.tensor([0.0, 1000.0])
        assert Preprocessing(window=(0.0, 3.0)).normalise(image).tolist() == [-1.5, 1.5]
        assert image.tolist() == [0.0, 1000.0]


class TestChannels:
    def scan(self, gain: float = 1.0) -> Scan:
        rng = np.random.default_rng(1)
        ct = scan_of(torso())
        other = (gain * rng.gamma(2, 50, ct.array.shape)).astype(np.float32)
        return Scan(np.concatenate([ct.array.astype(np.float32), other]), ct.grid, ct.paths * 2)

    def test_a_window_a_channel(self) -> None:
        preprocessing = Preprocessing(window=((-200.0, 400.0), (0.0, 300.0)), crop="none")
        image = preprocessing.normalise(preprocessing.prepare(self.scan()).image)
        for channel, window in enumerate(preprocessing.window):
            expected = Preprocessing(window=window).normalise(self.scan().array[channel])
            assert torch.equal(image[channel], expected)

    @pytest.mark.parametrize("crop", ["none", "body"])
    def test_a_channel_that_is_no_ct_is_standardised_in_each_scan(self, crop: str) -> None:
        preprocessing = Preprocessing(window=((-200.0, 400.0), None), crop=crop)
        image = preprocessing.normalise(preprocessing.prepare(self.scan()).image)
        assert image[1].mean().item() == pytest.approx(0, abs=1e-4)
        assert image[1].std(correction=0).item() == pytest.approx(1, abs=1e-4)
        louder = preprocessing.normalise(preprocessing.prepare(self.scan(gain=40.0)).image)
        torch.testing.assert_close(louder, image, rtol=1e-4, atol=1e-4)

    def test_what_is_outside_of_each_channel(self) -> None:
        scan = self.scan()
        scan = Scan(np.concatenate([scan.array[:1], *[scan.array[1:]] * 4]), scan.grid, scan.paths * 3)
        scan.array[4] = np.clip(scan.array[4], 3, 255)
        kinds = ((-200.0, 400.0), None, "noNorm", "rescale_to_0_1", "rgb_to_0_1")
        preprocessing = Preprocessing(window=kinds, crop="none")
        image = preprocessing.prepare(scan).image
        found = preprocessing.outside(image)
        assert found == (AIR, float(image[1].min()), float(scan.array[2].min()), 0.0, 0.0)
        assert found[1] < -0.5 < 0 < found[2]
        assert preprocessing.outside(preprocessing.normalise(image)) == found
        assert Preprocessing().outside(image) == (AIR,) * 5
        with pytest.raises(InputError, match="window: expected one a channel, 2, got 5"):
            preprocessing.outside(image[:2])

    def test_the_body_is_looked_for_in_the_ct(self) -> None:
        scan = self.scan()
        swapped = Scan(scan.array[::-1], scan.grid, scan.paths)
        expected = Preprocessing(window=((-200.0, 400.0), None)).prepare(scan).box
        assert Preprocessing(window=(None, (-200.0, 400.0))).prepare(swapped).box == expected
        with pytest.warns(InputWarning, match="cannot be CT in HU"):  # the other one has a window, too
            both = Preprocessing(window=((0.0, 250.0), (-200.0, 400.0))).prepare(swapped).box
        assert both == expected
        whole = Preprocessing(window=(None, None)).prepare(swapped).box
        assert [side.stop for side in whole] == list(torso().shape)

    def test_another_number_of_channels(self) -> None:
        with pytest.raises(InputError, match="window: expected one a channel, 2, got 3"):
            Preprocessing(window=((0.0, 1.0),) * 3).prepare(self.scan())

    def test_what_cannot_be_hu_is_told(self) -> None:
        raw = scan_of((torso() + 1024).astype(np.int16))
        with pytest.warns(InputWarning, match=r"scan\.nii\.gz: cannot be CT in HU: .*1024 had not been"):
            Preprocessing().prepare(raw)


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"window": (400.0, -200.0)}, "window: expected two HU values, the lower first"),
            ({"window": (float("nan"), 1.0)}, "window: expected"),
            ({"spacing": (1.0, 0.0, 1.0)}, "spacing: expected three positive distances"),
            ({"spacing": (1.0, 1.0)}, "spacing: expected three distances in mm, got 2"),
            ({"window": ()}, "window: expected two HU values"),
            ({"window": ((1.0, 2.0), (3.0,))}, "window: expected two HU values, or two for each channel"),
            ({"crop": "head"}, "crop: expected one of body, none, got 'head'"),
            ({"margin": -1.0}, "margin: expected a distance of at least 0 mm"),
            ({"threshold": float("inf")}, "threshold: expected a HU value"),
        ],
    )
    def test_refused(self, settings: dict, message: str) -> None:
        with pytest.raises(InputError, match=message):
            Preprocessing(**settings)

    @pytest.mark.parametrize("spacing", [None, (1.0, 1.5, 2.0)])
    def test_through_json(self, spacing: tuple[float, float, float] | None) -> None:
        preprocessing = Preprocessing((-100.0, 300.0), spacing, "none", 3.0, -400.0)
        assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing

    @pytest.mark.parametrize("window", [((-1.0, 2.0),), ((-200.0, 400.0), None, (0.0, 1.0)), (None, None)])
    def test_windows_through_json(self, window: tuple) -> None:
        preprocessing = Preprocessing(window)
        assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing

    @pytest.mark.parametrize("change", [{"window": 3}, {"spacing": [1, 2]}, {"margin": "x"}, {"extra": 1}])
    def test_malformed_entries(self, change: dict) -> None:
        with pytest.raises(InputError, match="preprocessing: expected crop, margin"):
            Preprocessing.from_dict(Preprocessing().to_dict() | change)


@pytest.mark.parametrize("name", ["case001", "case008", "case101"])
def test_real_scans_lose_no_organ_and_come_back(real_data: Path, name: str) -> None:
    case = next(case for case in find_cases(real_data, labelled=True) if case.name == name)
    scan = read_image(case.images)
    assert case.labels is not None
    labels = read_labels(case.labels, scan)
    preprocessing = Preprocessing()
    prepared = preprocessing.prepare(scan)
    if name != "case101":
        assert prepared.image[0].size < 0.55 * labels.size
    inside = preprocessing.prepare_labels(labels, prepared)
    np.testing.assert_array_equal(preprocessing.restore(inside, prepared), labels)
