"""The body's bounding box."""

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effseg.data.body import body_box, grow, hold
from effseg.data.nifti import read_image, read_labels


def volume(*boxes: tuple[slice, slice, slice], shape: tuple[int, int, int] = (20, 22, 24)) -> np.ndarray:
    array = np.full(shape, -1000, np.int16)
    for box in boxes:
        array[box] = 40
    return array


BODY = (slice(3, 15), slice(4, 12), slice(0, 24))
TABLE = (slice(0, 20), slice(13, 15), slice(0, 24))


def test_a_table_that_does_not_touch_stays_outside() -> None:
    assert body_box(volume(BODY, TABLE), -500) == BODY


def test_a_table_that_touches_belongs_to_the_body() -> None:
    touching = (slice(0, 20), slice(12, 14), slice(0, 24))
    assert body_box(volume(BODY, touching), -500) == (slice(0, 20), slice(4, 14), slice(0, 24))


def test_lungs_are_no_hole_in_the_box() -> None:
    array = volume(BODY)
    array[5:13, 6:10, 2:20] = -800
    assert body_box(array, -500) == BODY


def test_no_body() -> None:
    assert body_box(volume(), -500) is None


def test_the_threshold_itself_is_outside() -> None:
    assert body_box(np.full((2, 2, 2), -500, np.int16), -500) is None
    assert body_box(np.full((2, 2, 2), -499.9, np.float32), -500) == (slice(0, 2),) * 3


def test_of_equal_components_the_first_box_counts_in_any_memory_order() -> None:
    first, second = (slice(1, 3), slice(8, 10), slice(1, 3)), (slice(8, 10), slice(1, 3), slice(8, 10))
    array = volume(first, second)
    assert body_box(array, -500) == first
    assert body_box(np.asfortranarray(array), -500) == first


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    axes=st.permutations(range(3)),
    flips=st.tuples(*[st.sampled_from([1, -1])] * 3),
    density=st.floats(0.05, 0.9),
    seed=st.integers(0, 1000),
)
def test_every_memory_order_gives_the_same_answer(
    shape: tuple[int, int, int], axes: list[int], flips: tuple[int, ...], density: float, seed: int
) -> None:
    stored = np.where(np.random.default_rng(seed).random(shape) < density, 40, -1000).astype(np.int16)
    array = stored[:: flips[0], :: flips[1], :: flips[2]].transpose(axes)
    spacing = (0.8, 2.0, 5.0)
    assert body_box(array, -500, spacing) == body_box(np.ascontiguousarray(array), -500, spacing)


def cylinder(
    array: np.ndarray,
    centre: tuple[float, float],
    radius: float,
    inner: float = 0,
    length: slice = slice(None),
) -> None:
    """Draw soft tissue along z; `inner`: radius of what is hollow."""
    x, y = np.ogrid[: array.shape[0], : array.shape[1]]
    distance = np.hypot(x - centre[0], y - centre[1])
    array[..., length][(distance < radius) & (distance >= inner)] = 30


def scan(shape: tuple[int, int, int] = (120, 60, 40), noise: float = 10) -> np.ndarray:
    return np.random.default_rng(0).normal(-1000, noise, shape).astype(np.float32)


def inside(box: tuple[slice, ...] | None, *bounds: tuple[int, int]) -> bool:
    assert box is not None
    return all(side.start <= low and side.stop >= high for side, (low, high) in zip(box, bounds, strict=True))


def test_both_legs_an_arm_and_a_finger_are_kept() -> None:
    array = scan()
    for centre, radius in (((30, 30), 18), ((70, 30), 16), ((100, 40), 9), ((114, 12), 5)):
        cylinder(array, centre, radius)
    box = body_box(array, -500, (2.0, 2.0, 3.0))
    assert inside(box, (13, 119), (8, 47), (0, 40))


def test_tables_bags_and_cables_are_left_out_whatever_their_size() -> None:
    array = scan()
    cylinder(array, (60, 36), 20)
    array[2:118, 4:6] = 200  # two plates and what joins them: hollow, and larger than the body
    array[2:118, 10:12] = 200
    array[2:4, 4:12] = array[116:118, 4:12] = 200
    cylinder(array, (20, 30), 8, inner=7)  # a bag of air
    cylinder(array, (100, 50), 1.2)  # a cable
    assert body_box(array, -500, (2.0, 2.0, 3.0)) == (slice(41, 80), slice(17, 56), slice(0, 40))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_solid_board_is_left_out_and_a_flat_hand_is_kept(axis: int) -> None:
    array = scan((200, 160, 30))
    cylinder(array, (70, 80), 40)
    np.moveaxis(array, axis, 0)[142:150] = 100  # 8 mm
    expected = (slice(31, 110), slice(41, 120), slice(0, 30))
    assert body_box(array, -500, (1.0, 1.0, 4.0)) == expected
    array[155:165, 20:90, 2:28] = 30  # 10 mm, 70 mm, 104 mm
    assert inside(body_box(array[:, :140], -500, (1.0, 1.0, 4.0)), (31, 165), (20, 120), (0, 30))


def test_an_arm_that_lies_on_the_table_is_kept_with_it() -> None:
    array = scan()
    cylinder(array, (60, 36), 20)
    array[2:118, 4:6] = 200
    cylinder(array, (105, 14), 9)
    assert inside(body_box(array, -500, (2.0, 2.0, 3.0)), (41, 118), (4, 56), (0, 40))


@pytest.mark.parametrize("hu", [-870, -940])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_lungs_that_the_field_of_view_cuts_are_kept(hu: float, axis: int) -> None:
    array = np.random.default_rng(0).normal(hu, 60, (40, 40, 40)).astype(np.float32)
    array[:8] = 40
    turned = np.moveaxis(array, 0, axis)
    assert body_box(turned, -500, (2.0, 2.0, 2.0)) == (slice(0, 40),) * 3
    assert body_box(np.flip(turned, axis), -500, (2.0, 2.0, 2.0)) == (slice(0, 40),) * 3


@pytest.mark.parametrize("padding", [-3024, -2000])
@pytest.mark.parametrize("round_field", [True, False])
def test_lungs_that_end_at_padding_are_kept(padding: float, round_field: bool) -> None:
    array = np.random.default_rng(0).normal(-870, 15, (60, 60, 12)).astype(np.float32)
    x, y = np.ogrid[-29.5:30, -29.5:30]
    chest, lungs = (x / 45) ** 2 + (y / 24) ** 2 < 1, (x / 42) ** 2 + (y / 20) ** 2 < 1
    array[~chest] -= 130
    array[chest & ~lungs] = 40
    array[28:32] = 40
    seen = x**2 + y**2 < 26**2 if round_field else (abs(x) < 26) & (abs(y) < 15)
    array[~seen] = padding
    assert inside(body_box(array, -500, (4.0, 4.0, 5.0)), (4, 56), (15, 45), (0, 12))


@pytest.mark.parametrize("padding", [-3024, -2000])
def test_air_that_ends_at_padding_is_no_lung(padding: float) -> None:
    array = scan()
    cylinder(array, (60, 30), 20)
    array[:10] = array[-10:] = padding
    assert body_box(array, -500, (2.0, 2.0, 3.0)) == (slice(41, 80), slice(11, 50), slice(0, 40))


@pytest.mark.parametrize("noise", [5, 60])
def test_noisy_air_is_no_lung(noise: float) -> None:
    array = scan(noise=noise).clip(-1024)
    cylinder(array, (60, 30), 20)
    assert body_box(array, -300, (2.0, 2.0, 3.0)) == (slice(41, 80), slice(11, 50), slice(0, 40))


def test_strange_voxel_sizes_do_no_harm() -> None:
    array = volume(BODY)
    for spacing in ((1e-30, 1.0, 1e30), (1e-40,) * 3, (1e30,) * 3):
        assert body_box(array, -500, spacing) == BODY


def test_hold() -> None:
    wanted = np.zeros((20, 22, 24), bool)
    assert hold(BODY, wanted) == BODY
    wanted[16, 5, 5] = wanted[4, 1, 23] = True
    assert hold(BODY, wanted) == (slice(3, 17), slice(1, 12), slice(0, 24))


def outside(path: Path, labels: Path, fields: int) -> int:
    """Foreground voxels outside of the crop, in the whole scan and in random sub-fields of 30 to 100 %."""
    scan = read_image(path)
    foreground = read_labels(labels, scan) > 0
    lost = 0
    rng = np.random.default_rng(0)
    for number in range(fields + 1):
        size = [round(extent * rng.uniform(0.3, 1)) if number else extent for extent in foreground.shape]
        start = [
            rng.integers(extent - wanted + 1) for extent, wanted in zip(foreground.shape, size, strict=True)
        ]
        field = tuple(slice(low, low + wanted) for low, wanted in zip(start, size, strict=True))
        box = body_box(scan.array[0][field], -500, scan.spacing)
        lost += int(foreground[field].sum() - (foreground[field][box].sum() if box else 0))
    return lost


@pytest.mark.parametrize("name", ["case001", "case008", "case101"])
def test_real_scans_lose_nothing(real_data: Path, name: str) -> None:
    assert outside(real_data / f"{name}_ct.nii.gz", real_data / f"{name}_seg.nii.gz", fields=3) == 0


@pytest.mark.slow
def test_a_real_chest_loses_nothing_in_200_fields_of_view(real_data: Path) -> None:
    assert outside(real_data / "case301_ct.nii.gz", real_data / "case301_seg.nii.gz", fields=200) == 0


def test_grow_is_in_mm_and_stays_inside() -> None:
    box = slice(3, 15), slice(4, 12), slice(0, 24)
    grown = grow(box, 5.0, (1.0, 2.0, 3.0), (20, 22, 24))
    assert grown == (slice(0, 20), slice(1, 15), slice(0, 24))
    assert grow(box, 0.0, (1.0, 1.0, 1.0), (20, 22, 24)) == box


@pytest.mark.slow
def test_a_volume_of_512_cubed_takes_seconds() -> None:
    array = np.full((512, 512, 512), -1000, np.int16, order="F")
    array[40:470, 120:430, :] = 40
    array[:, 440:450, :] = 40
    start = time.process_time()
    box = body_box(array, -500)
    assert box == (slice(40, 470), slice(120, 430), slice(0, 512))
    assert time.process_time() - start < 15
