"""What the numbers of a channel are taken for."""

import json
from pathlib import Path

import numpy as np
import pytest

from effseg.data.intensities import channel_names, foreground_statistics, is_ct, no_hu
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


def test_names_of_channels(tmp_path: Path) -> None:
    assert channel_names(tmp_path) is None
    path = tmp_path / "dataset.json"
    for entries, names in (
        ({"channel_names": {"0": "CT", "1": "PET"}}, ("CT", "PET")),
        ({"modality": {"0": "MR"}}, ("MR",)),
        ({"labels": {}}, None),
    ):
        path.write_text(json.dumps(entries), encoding="utf-8-sig")
        assert channel_names(tmp_path) == names
    path.write_text('{"channel_names": {"1": "CT"}}')
    with pytest.raises(InputError, match="expected channel_names as"):
        channel_names(tmp_path)
    assert [is_ct(name) for name in ("CT", "ct", "T1", "CTA")] == [True, True, False, False]


def test_statistics_of_what_is_not_masked() -> None:
    channel = np.random.default_rng(0).normal(500, 90, (6, 7, 8)).astype(np.float32)
    expected = channel.mean(), channel.std()
    assert foreground_statistics(channel) == pytest.approx(expected, rel=1e-5)
    masked = np.zeros((9, 9, 9), np.float32)
    masked[:6, :7, :8] = channel
    assert foreground_statistics(masked) == pytest.approx(expected, rel=1e-5)
    assert foreground_statistics(np.zeros((2, 2, 2))) == (0.0, 1.0)
