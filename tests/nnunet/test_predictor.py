"""Whole volumes through nnU-Net's predictor."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from effseg.errors import InputError
from effseg.nnunet.network import WholeVolumeNet
from effseg.nnunet.predictor import Predictor

DATA = torch.randn((1, 9, 12, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def predictor():
    torch.manual_seed(0)
    made = Predictor(device=torch.device("cpu"))
    made.network = WholeVolumeNet(1, 3, preset="tiny")
    return made


def test_logits_are_those_of_the_whole_volume(predictor):
    logits = predictor.predict_logits_from_preprocessed_data(DATA)
    with torch.no_grad():
        torch.testing.assert_close(logits, predictor.network.eval().logits(DATA[None])[0])


def test_nnunets_own_predictor_is_refused(predictor):
    """It calls the network with windows."""
    theirs = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False)
    theirs.network = predictor.network
    with pytest.raises(InputError, match=r"trained on whole volumes.*`effseg nnunet predict`") as error:
        theirs._internal_maybe_mirror_and_predict(DATA[None])
    assert "\n" not in str(error.value)


def test_folds_are_averaged(predictor):
    folds = [WholeVolumeNet(1, 3, preset="tiny").state_dict() for _ in range(2)]
    each = []
    for fold in folds:
        predictor.list_of_parameters = [fold]
        each.append(predictor.predict_logits_from_preprocessed_data(DATA))
    predictor.list_of_parameters = folds
    torch.testing.assert_close(predictor.predict_logits_from_preprocessed_data(DATA), (each[0] + each[1]) / 2)


def test_classes_go_to_the_file_without_logits(predictor, monkeypatch):
    written = {}

    def write_seg(labels, path, properties):
        written[path] = labels

    expected = predictor.predict_logits_from_preprocessed_data(DATA).argmax(0).numpy()
    monkeypatch.setattr(predictor.network, "logits", None)  # makes logits
    predictor.plans_manager = SimpleNamespace(
        transpose_backward=[0, 1, 2],
        image_reader_writer_class=lambda: SimpleNamespace(write_seg=write_seg),
    )
    predictor.label_manager = SimpleNamespace(foreground_labels=[1, 2])
    predictor.dataset_json = {"file_ending": ".nii.gz"}
    properties = {
        "shape_before_cropping": (9, 14, 10),
        "bbox_used_for_cropping": [[0, 9], [1, 13], [0, 10]],
        "shape_after_cropping_and_before_resampling": (9, 12, 10),
    }
    item = {"data": DATA, "data_properties": properties, "ofile": "case"}
    assert predictor.predict_from_data_iterator([item]) == [None]
    np.testing.assert_array_equal(written["case.nii.gz"][:, 1:13], expected)
    assert not written["case.nii.gz"][:, [0, 13]].any()


@pytest.mark.parametrize("method", ["predict_from_data_iterator", "predict_logits_from_preprocessed_data"])
def test_other_networks_get_windows(predictor, monkeypatch, method):
    predictor.network = torch.nn.Conv3d(1, 3, 1)
    monkeypatch.setattr(nnUNetPredictor, method, lambda self, data, *_: data)
    assert getattr(predictor, method)(DATA) is DATA
