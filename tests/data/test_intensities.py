"""What the numbers of a channel are taken for."""

import re

import numpy as np
import pytest

from effseg.data.intensities import drawn, foreground_statistics, listed, no_hu, parse_window, scaled, scaling
from effseg.errors import InputError


def ct() -> np.ndarray:
    rng = np.random.default_rng(0)
    array = np.full((20, 20, 20), -1000.0)
    array[4:16, 4:16] = rng.normal(20, 80, (12, 12, 20))
    return array + rng.normal(0, 10, array.shape)


def test_hounsfield_units_are_not_doubted() -> None:
    assert no_hu(ct()) is None
    assert no_hu(ct().astype(np.int16)) is None
    assert no_hu(np.where(ct() < -900, -3024, ct())) is None  # fat, beside padding


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda hu: (hu.clip(-1000, 1000) + 1000) / 2000, "as if they had been scaled"),
        (lambda hu: (hu - hu.mean()) / hu.std(), "as if they had been scaled"),
        (lambda hu: np.rint((hu.clip(-160, 240) + 160) / 400 * 255), "as grey values of 8 bits do"),
        (lambda hu: np.rint(hu + 1024).clip(0), "most at .*, as if 1024 had not been subtracted"),
        (lambda hu: np.rint(hu + 1000).clip(0), "most at 0, as if 1024 had not been subtracted"),
        (lambda hu: np.where(hu < -900, -2000, np.rint(hu + 1024)), "nothing is air or fat"),
        (lambda hu: hu.clip(0, 3000), "most at 0"),
    ],
)
def test_what_cannot_be_hounsfield_units(change: object, why: str) -> None:
    import re

    assert re.search(why, str(no_hu(change(ct()))))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("CT", (-200.0, 400.0)),
        (" ct", (-200.0, 400.0)),
        ("T1", None),
        ("CTA", None),
        ("zscore", None),
        ("noNorm", "noNorm"),
        ("NONORM", "noNorm"),
        ("rescale_to_0_1", "rescale_to_0_1"),
        ("rgb_to_0_1", "rgb_to_0_1"),
    ],
)
def test_what_a_channels_name_says(name: str, how: object) -> None:
    assert scaling(name, (-200.0, 400.0)) == how


def test_schemes_are_nnunets() -> None:
    image = np.random.default_rng(0).integers(3, 250, (5, 4, 4, 4)).astype(np.int16)
    hows = ((-200.0, 400.0), None, "noNorm", "rescale_to_0_1", "rgb_to_0_1")
    ct, standard, same, rescaled, rgb = scaled(image, hows)
    assert np.array_equal(ct, image[0])
    assert np.array_equal(same, image[2])
    assert (standard.mean(), standard.std()) == pytest.approx((0, 1), abs=1e-5)
    assert (rescaled.min(), rescaled.max()) == (0, 1)
    assert rescaled * np.ptp(image[3]) + image[3].min() == pytest.approx(image[3].astype(float), rel=1e-6)
    assert np.array_equal(rgb, image[4] / np.float32(255))
    assert listed(hows) == "-200 to 400 HU, standardised, noNorm, rescale_to_0_1, rgb_to_0_1"
    assert parse_window([[-200, 400], *hows[1:]]) == hows
    assert [drawn(how, same) for how in hows] == [
        (-200, 400), (-2, 2), (same.min(), same.max()), (0, 1), (0, 1)
    ]  # fmt: skip
    with pytest.raises(InputError, match="rgb_to_0_1: expected values from 0 to 255, found 3 to 256"):
        scaled(np.array([[[[3, 256]]]]), ("rgb_to_0_1",))
    with pytest.raises(InputError, match="window: expected two HU values"):
        parse_window(["noNorm", "anything"])


@pytest.mark.parametrize("value", [np.finfo(np.float32).min, 1e25, 1e300])
def test_values_for_no_data_are_told(value: float) -> None:
    """Where a window cuts them off they do no harm."""
    image = np.array([[[[1.0, value]]], [[[2.0, 3.0]]]])
    expected = re.escape(f"expected intensities from -1e+15 to 1e+15, found {value:g}")
    for how in (None, "noNorm", "rescale_to_0_1"):
        with pytest.raises(InputError, match=expected):
            scaled(image, (how, (0.0, 1.0)))
    scaled(image.clip(-1e38, 1e38), ((0.0, 1.0), "noNorm"))


def test_statistics_of_what_is_not_masked() -> None:
    channel = np.random.default_rng(0).normal(500, 90, (6, 7, 8)).astype(np.float32)
    expected = channel.mean(), channel.std()
    assert foreground_statistics(channel) == pytest.approx(expected, rel=1e-5)
    masked = np.zeros((9, 9, 9), np.float32)
    masked[:6, :7, :8] = channel
    assert foreground_statistics(masked) == pytest.approx(expected, rel=1e-5)
    assert foreground_statistics(np.zeros((2, 2, 2))) == (0.0, 1.0)
