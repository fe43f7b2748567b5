import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist

from effseg.evaluation.metrics import case_metrics, confusion_matrix, dice_per_class, mean_metrics

UNIT = (1.0, 1.0, 1.0)


def random_maps(seed, classes=4, shape=(5, 6, 7)):
    rng = np.random.default_rng(seed)
    return rng.integers(0, classes, (2, *shape), dtype=np.uint8)


def surface_points(mask, spacing):
    """Centres in mm of the voxels of a mask that touch its outside (6-neighbours)."""
    padded = np.pad(mask, 1)
    return np.argwhere(padded & ~binary_erosion(padded)) * spacing


def hd95_by_definition(prediction, reference, spacing):
    distances = cdist(surface_points(prediction, spacing), surface_points(reference, spacing))
    return max(np.percentile(distances.min(1), 95), np.percentile(distances.min(0), 95))


def two_cubes(shift, edge=8, size=16):
    """Maps of a cube of `edge` voxels and of the same cube moved by `shift` voxels."""
    cube = np.zeros((size, size, size), np.uint8)
    cube[3 : 3 + edge, 3 : 3 + edge, 3 : 3 + edge] = 1
    return np.roll(cube, shift, (0, 1, 2)), cube


class TestCounts:
    @given(st.integers(0, 1000))
    @settings(max_examples=25, deadline=None)
    def test_by_definition(self, seed):
        prediction, reference = random_maps(seed)
        metrics = case_metrics(prediction, reference, 4, UNIT, 1.0)
        for label in (1, 2, 3):
            found, true = prediction == label, reference == label
            expected = {
                "TP": (found & true).sum(),
                "FP": (found & ~true).sum(),
                "FN": (~found & true).sum(),
                "TN": (~found & ~true).sum(),
                "n_pred": found.sum(),
                "n_ref": true.sum(),
                "Dice": 2 * (found & true).sum() / (found.sum() + true.sum()),
                "IoU": (found & true).sum() / (found | true).sum(),
            }
            assert {key: metrics[label][key] for key in expected} == pytest.approx(expected, rel=1e-12)

    def test_ignored_voxels_count_nowhere(self):
        prediction, reference = random_maps(1)
        kept = reference != 3
        counts = confusion_matrix(prediction, reference, 4, ignore=3)
        assert counts.sum() == kept.sum()
        assert counts[3].sum() == 0
        np.testing.assert_array_equal(counts, confusion_matrix(prediction[kept], reference[kept], 4))

    def test_ignore_value_beyond_the_classes(self):
        prediction, reference = random_maps(2, classes=3)
        reference[0] = 255
        assert confusion_matrix(prediction, reference, 3, ignore=255).sum() == reference[1:].size
        metrics = case_metrics(prediction, reference, 3, UNIT, 1.0, ignore=255)
        assert metrics[1]["n_ref"] == (reference == 1).sum()

    def test_in_chunks(self, monkeypatch):
        prediction, reference = random_maps(3)
        whole = confusion_matrix(prediction, reference, 4)
        monkeypatch.setattr("effseg.evaluation.metrics._CHUNK", 11)
        np.testing.assert_array_equal(confusion_matrix(prediction, reference, 4), whole)

    def test_many_classes(self):
        prediction = np.arange(300, dtype=np.int16).reshape(3, 10, 10)
        assert (dice_per_class(prediction, prediction, 301)[:300] == 1).all()

    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64])
    def test_any_integer_dtype_and_order(self, dtype):
        prediction, reference = random_maps(4)
        np.testing.assert_array_equal(
            dice_per_class(np.asfortranarray(prediction.astype(dtype)), reference[::-1][::-1], 4),
            dice_per_class(prediction, reference, 4),
        )

    def test_refuses_what_does_not_match(self):
        with pytest.raises(ValueError, match=r"prediction: expected shape \(2, 2\)"):
            confusion_matrix(np.zeros((2, 3), int), np.zeros((2, 2), int), 2)
        with pytest.raises(ValueError, match="reference: expected classes 0 to 1, got 0 to 5"):
            confusion_matrix(np.zeros(4, int), np.array([0, 5, 0, 0]), 2)


class TestDice:
    def test_by_hand(self):
        reference = np.array([0, 0, 1, 1, 2, 2, 2, 0])
        prediction = np.array([0, 1, 1, 1, 2, 2, 0, 0])
        np.testing.assert_allclose(dice_per_class(prediction, reference, 4), [4 / 6, 4 / 5, 4 / 5, np.nan])

    @given(st.integers(0, 1000))
    @settings(max_examples=25, deadline=None)
    def test_symmetric_and_bounded(self, seed):
        prediction, reference = random_maps(seed, classes=5, shape=(2, 3, 2))
        dice = dice_per_class(prediction, reference, 5)
        np.testing.assert_array_equal(dice, dice_per_class(reference, prediction, 5))
        assert ((dice >= 0) & (dice <= 1) | np.isnan(dice)).all()
        assert (np.isnan(dice) == ~np.isin(range(5), np.stack([prediction, reference]))).all()


class TestSurfaces:
    def test_the_same_organ(self):
        _, cube = two_cubes((0, 0, 0))
        metrics = case_metrics(cube, cube, 2, (0.7, 0.7, 3.0), tolerance_mm=0.5)[1]
        assert metrics["NSD"] == 1
        assert metrics["HD95"] == 0

    @pytest.mark.parametrize(("axis", "distance"), [(0, 1.0), (1, 2.0), (2, 4.0)])
    def test_cube_moved_by_one_voxel(self, axis, distance):
        """A face of the cube is more than 5 % of its surface: HD95 is the step along that axis."""
        shift = tuple(int(axis == other) for other in range(3))
        metrics = case_metrics(*two_cubes(shift), 2, (1.0, 2.0, 4.0), tolerance_mm=1.0)[1]
        assert metrics["HD95"] == pytest.approx(distance)
        assert metrics["Dice"] == pytest.approx(7 / 8)

    def test_surface_dice_by_hand(self):
        """A long box moved along its length: all but its two ends still lies on the other's surface."""
        box = np.zeros((44, 28, 28), np.uint8)
        box[3:33, 3:23, 3:23] = 1  # 30 x 20 x 20 voxels of 3 x 1 x 1 mm
        moved = np.roll(box, 1, 0)
        ends, sides = 2 * 20 * 20, 4 * 90 * 20
        strict = case_metrics(moved, box, 2, (3.0, 1.0, 1.0), tolerance_mm=0.4)[1]["NSD"]
        assert strict == pytest.approx(sides / (sides + ends), abs=0.02)
        assert case_metrics(moved, box, 2, (3.0, 1.0, 1.0), tolerance_mm=3.0)[1]["NSD"] == 1

    def test_two_voxels_far_apart(self):
        prediction, reference = np.zeros((2, 9, 9, 9), np.uint8)
        prediction[1, 2, 1] = 1
        reference[4, 6, 1] = 1
        metrics = case_metrics(prediction, reference, 2, (2.0, 1.0, 3.0), tolerance_mm=1.0)[1]
        assert metrics["HD95"] == pytest.approx(np.hypot(6, 4), rel=1e-6)
        assert metrics["NSD"] == 0
        assert metrics["Dice"] == 0

    @given(st.integers(0, 1000), st.tuples(*[st.sampled_from([0.5, 1.0, 2.5])] * 3))
    @settings(max_examples=25, deadline=None)
    def test_hd95_by_definition(self, seed, spacing):
        rng = np.random.default_rng(seed)
        prediction, reference = (rng.random((2, 5, 6, 7)) < 0.15).astype(np.uint8)
        prediction[2, 3, 3] = reference[2, 2, 3] = 1
        value = case_metrics(prediction, reference, 2, spacing, 1.0)[1]["HD95"]
        assert value == pytest.approx(hd95_by_definition(prediction == 1, reference == 1, spacing), rel=1e-5)

    @given(st.integers(0, 1000))
    @settings(max_examples=15, deadline=None)
    def test_symmetric(self, seed):
        prediction, reference = random_maps(seed, classes=3, shape=(4, 5, 6))
        forth = case_metrics(prediction, reference, 3, (1.0, 2.0, 3.0), 1.5)
        back = case_metrics(reference, prediction, 3, (1.0, 2.0, 3.0), 1.5)
        for label in forth:
            for name in ("Dice", "IoU", "NSD", "HD95"):
                assert forth[label][name] == pytest.approx(back[label][name], rel=1e-6), name

    def test_grows_with_the_tolerance(self):
        prediction, cube = two_cubes((1, 1, 0))
        scores = [case_metrics(prediction, cube, 2, UNIT, mm)[1]["NSD"] for mm in (0.1, 0.9, 1.1, 2)]
        assert scores == sorted(scores)
        assert scores[0] < scores[-1] == 1

    def test_crop_to_the_organ_changes_nothing(self):
        """The same organs far from and at the volume's border."""
        prediction, cube = two_cubes((1, 0, 0))
        wide = case_metrics(prediction, cube, 2, (1.0, 2.0, 4.0), 0.5)[1]
        tight = case_metrics(prediction[3:12, 3:11, 3:11], cube[3:12, 3:11, 3:11], 2, (1.0, 2.0, 4.0), 0.5)[1]
        assert (wide["NSD"], wide["HD95"]) == (tight["NSD"], tight["HD95"])


class TestAbsence:
    def test_in_both(self):
        empty = np.zeros((4, 5, 6), np.uint8)
        metrics = case_metrics(empty, empty, 2, UNIT, 1.0)[1]
        assert all(np.isnan(metrics[name]) for name in ("Dice", "IoU", "NSD", "HD95"))
        assert metrics["TN"] == empty.size

    @pytest.mark.parametrize("missed", [True, False])
    def test_in_one(self, missed):
        empty, cube = np.zeros((16, 16, 16), np.uint8), two_cubes((0, 0, 0))[1]
        pair = (empty, cube) if missed else (cube, empty)
        metrics = case_metrics(*pair, 2, (1.0, 2.0, 3.0), 1.0)[1]
        assert [metrics[name] for name in ("Dice", "IoU", "NSD")] == [0, 0, 0]
        assert metrics["HD95"] == pytest.approx(np.sqrt(16**2 + 32**2 + 48**2))

    def test_ignored_region_hides_a_false_positive(self):
        prediction, cube = two_cubes((0, 0, 0))
        prediction = prediction.copy()
        prediction[0, 0, 0] = 1
        reference = cube.copy()
        reference[0] = 255
        metrics = case_metrics(prediction, reference, 2, UNIT, 0.5, ignore=255)[1]
        assert (metrics["Dice"], metrics["NSD"], metrics["HD95"]) == (1, 1, 0)

    def test_left_out_of_means(self):
        nan = float("nan")
        means = mean_metrics([{"Dice": dice, "NSD": nan} for dice in (0.5, nan, 1.0)])
        assert means["Dice"] == 0.75
        assert np.isnan(means["NSD"])
        assert json.dumps(means) == '{"Dice": 0.75, "NSD": NaN}'
