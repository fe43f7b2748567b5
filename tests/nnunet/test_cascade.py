"""The second stage of a cascade against nnU-Net's own predictor, on a CPU in float32."""

import io
from contextlib import redirect_stdout

import nnunet_models as models
import numpy as np
import pytest

from effseg.errors import InputError
from effseg.nnunet import Predictor

OWN = (1.1, 0.9, 0.8)
KINDS = {
    "labels": {},
    "regions, transposed, cropped, z-score within a mask": {
        "labels": models.REGIONS, "forward": (2, 0, 1), "margin": 4, "scheme": "ZScoreNormalization",
    },
}  # fmt: skip


def made(folder, labels=models.LABELS, forward=(0, 1, 2), margin=0, scheme="CTNormalization"):
    """A model, a folder with a scan, and one with labels of the previous stage."""
    entries = models.configuration((16, 16, 12), (1.5, 1.2, 1.5), scheme, previous_stage="3d_lowres")
    plans = models.make_plans(entries, forward, name="3d_cascade_fullres")
    model = models.write_model(folder / "model", plans, labels)
    for name in ("scans", "previous"):
        (folder / name).mkdir()
    image, truth = models.blobs((28, 30, 26), seed=7)
    if margin:
        border = np.ones(image.shape, bool)
        border[(slice(margin, -margin),) * 3] = False
        image[border] = 0
    models.write_scan(folder / "scans" / "a_0000.nii.gz", image, OWN)
    models.write_scan(folder / "previous" / "a.nii.gz", models.shifted(truth).astype(np.uint8), OWN)
    return model, folder / "scans", folder / "previous"


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_nnunets(tmp_path, kind):
    model, scans, previous = made(tmp_path, **KINDS[kind])
    with redirect_stdout(io.StringIO()):
        theirs = models.nnunets_labels(model, scans, tmp_path / "theirs", exact=True, previous=str(previous))
    predictor = Predictor(model, device="cpu")
    (path,) = predictor.predict_folder(scans, tmp_path / "ours", previous=previous)
    labels = models.read_labels(path)
    assert len(np.unique(labels)) >= 3
    assert np.mean(labels == theirs["a.nii.gz"]) >= 0.9999
    assert (predictor.predict_file([scans / "a_0000.nii.gz"], previous=previous / "a.nii.gz") == labels).all()
    models.write_scan(previous / "a.nii.gz", np.zeros(labels.shape, np.uint8), OWN)
    (path,) = predictor.predict_folder(scans, tmp_path / "ours", previous=previous)
    assert (models.read_labels(path) != labels).any()


def test_what_does_not_fit_is_refused_in_one_line(tmp_path):
    model, scans, previous = made(tmp_path)
    predictor = Predictor(model, device="cpu")
    with pytest.raises(InputError, match=r"by 3d_lowres, the first stage .*got none"):
        predictor.predict_folder(scans, tmp_path / "ours")
    with pytest.raises(InputError, match="expected the previous stage's labels, found no file"):
        predictor.predict_folder(scans, tmp_path / "ours", previous=tmp_path)
    models.write_scan(previous / "a.nii.gz", np.zeros((28, 30, 25), np.uint8), OWN)
    with pytest.raises(InputError, match="scan's 28 x 30 x 26 voxels, got 28 x 30 x 25"):
        predictor.predict_folder(scans, tmp_path / "ours", previous=previous)
    labels = np.full((28, 30, 26), 65538, np.float32)
    models.write_scan(previous / "a.nii.gz", labels, OWN)
    with pytest.raises(InputError, match="labels from -32768 to 32767, got 65538"):
        predictor.predict_folder(scans, tmp_path / "ours", previous=previous)
    with pytest.raises(InputError, match="labels from -32768 to 32767, got nan"):
        predictor(labels[None], OWN, labels * np.nan)
