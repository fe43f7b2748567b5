import json

import nibabel as nib
import numpy as np
import pytest

from effseg import phantom
from effseg.errors import InputError

SMALL = (32, 24, 24)


def centres(labels):
    """Centre of every organ in index units, by name."""
    found = {name: np.argwhere(labels == value) for value, name in enumerate(phantom.NAMES) if value}
    return {name: places.mean(0) for name, places in found.items() if len(places)}


@pytest.mark.parametrize("shape", [(32, 24, 24), (33, 25, 31), (24, 40, 17)])
def test_any_shape(shape):
    image, labels = phantom.generate(shape, seed=1)
    assert image.shape == labels.shape == shape
    assert image.dtype == np.int16
    assert labels.dtype == np.uint8
    assert labels.max() < len(phantom.NAMES)
    assert image.min() >= -1024
    assert -1050 < np.median(image[:2]) < -900  # air beside the body


def test_reproducible_by_seed():
    first, second, other = (phantom.generate(SMALL, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert (first[1] != other[1]).mean() > 0.01


def test_every_organ_in_its_place():
    """RAS+: liver right of the spleen, bladder lowest, spine behind everything; on many bodies."""
    for seed in range(6):
        image, labels = phantom.generate((64, 48, 48), seed)
        places = centres(labels)
        assert set(places) == set(phantom.NAMES[1:])
        assert places["liver"][0] > places["spleen"][0]
        assert places["kidney_right"][0] > places["kidney_left"][0]
        assert places["adrenal_gland_right"][0] > places["adrenal_gland_left"][0]
        assert places["inferior_vena_cava"][0] > places["aorta"][0]
        assert places["adrenal_gland_left"][2] > places["kidney_left"][2]
        assert min(places, key=lambda name: places[name][2]) == "urinary_bladder"
        spine = np.argwhere(image[24:40, :, :16] > 240)  # below the ribs
        assert spine[:, 1].mean() < places["aorta"][1] < places["urinary_bladder"][1]


def test_pairs_look_alike():
    """Nothing but the place tells the twins apart: HU and size agree over bodies, within their spread."""
    values = {name: [] for name in phantom.NAMES}
    sizes = {name: [] for name in phantom.NAMES}
    for seed in range(12):
        image, labels = phantom.generate((64, 48, 48), seed)
        for value, name in enumerate(phantom.NAMES):
            values[name].append(np.median(image[labels == value]))
            sizes[name].append((labels == value).sum())
    twins = [("kidney_right", "kidney_left"), ("aorta", "inferior_vena_cava"), ("liver", "spleen")]
    for twin, other in twins:
        spread = np.std(values[twin]) + np.std(values[other])
        assert abs(np.mean(values[twin]) - np.mean(values[other])) < 0.5 * spread
    assert 0.7 < np.mean(sizes["kidney_right"]) / np.mean(sizes["kidney_left"]) < 1.4
    assert np.mean(values["kidney_left"]) > np.mean(values["background"])


def test_a_seed_is_one_body_at_any_resolution():
    coarse, fine = (phantom.generate(shape, seed=5)[1] for shape in ((32, 24, 24), (64, 48, 48)))
    for name, place in centres(coarse).items():
        if "adrenal" not in name:
            assert np.abs(2 * place + 0.5 - centres(fine)[name]).max() < 2.5, name


@pytest.mark.parametrize("shape", [(32, 32), (32, 24, 7), (0, 24, 24)])
def test_bad_shape(shape):
    with pytest.raises(InputError, match="shape: expected three lengths of at least 8"):
        phantom.generate(shape)


def test_bad_seed_and_cases(tmp_path):
    with pytest.raises(InputError, match="seed"):
        phantom.generate(SMALL, seed=-1)
    with pytest.raises(InputError, match="cases"):
        phantom.write_dataset(tmp_path, cases=0)


def test_dataset_in_nnunet_layout(tmp_path):
    phantom.write_dataset(tmp_path / "set", cases=2, shape=SMALL, seed=7)
    written = sorted(str(path.relative_to(tmp_path / "set")) for path in tmp_path.rglob("*.*"))
    assert written == [
        "dataset.json",
        "imagesTr/phantom_000_0000.nii.gz",
        "imagesTr/phantom_001_0000.nii.gz",
        "imagesTs/phantom_002_0000.nii.gz",
        "labelsTr/phantom_000.nii.gz",
        "labelsTr/phantom_001.nii.gz",
        "labelsTs/phantom_002.nii.gz",
    ]
    description = json.loads((tmp_path / "set/dataset.json").read_text())
    assert description["numTraining"] == 2
    assert description["channel_names"] == {"0": "CT"}
    assert description["labels"]["background"] == 0
    assert description["labels"]["urinary_bladder"] == 10

    image = nib.load(tmp_path / "set/imagesTr/phantom_001_0000.nii.gz")
    labels = nib.load(tmp_path / "set/labelsTr/phantom_001.nii.gz")
    assert image.get_data_dtype() == np.int16
    assert labels.get_data_dtype() == np.uint8
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(image.header.get_zooms(), phantom.spacing(SMALL))
    np.testing.assert_array_equal(image.affine, labels.affine)
    expected_image, expected_labels = phantom.generate(SMALL, seed=8)
    np.testing.assert_array_equal(np.asarray(image.dataobj), expected_image)
    np.testing.assert_array_equal(np.asarray(labels.dataobj), expected_labels)
