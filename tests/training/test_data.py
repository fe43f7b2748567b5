import numpy as np
import pytest
import torch

from effseg import phantom
from effseg.data.identity import case_identity
from effseg.errors import InputError
from effseg.training import TrainingConfig
from effseg.training.data import class_weights, load_training_data, split
from effseg.training.distributed import World

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return phantom.write_dataset(tmp_path_factory.mktemp("data"), cases=6, shape=(20, 16, 12))


def names(cases):
    return [case.name[-1] for case in cases]


def test_class_weights_are_inverse_roots_with_a_mean_of_one():
    counts = np.array([900, 90, 10])
    weights = class_weights(counts).double().numpy()
    assert (weights * counts).sum() / counts.sum() == pytest.approx(1)
    assert weights[1] / weights[0] == pytest.approx(np.sqrt(10))
    assert weights[2] / weights[0] == pytest.approx(np.sqrt(90))


def test_a_class_without_voxels_weighs_nothing():
    weights = class_weights(np.array([900, 0, 100]))
    assert weights[1] == 0
    assert torch.isfinite(weights).all()


def test_validation_cases_never_train(folder):
    config = TrainingConfig(data=folder, output="run")
    training, validation = split(config.replace(validation="phantom_001,phantom_004"))
    assert (names(training), names(validation)) == (["0", "2", "3", "5"], ["1", "4"])
    training, validation = split(
        config.replace(cases="phantom_00[0-2]", validation="phantom_002-phantom_003")
    )
    assert (names(training), names(validation)) == (["0", "1"], ["2", "3"])


def test_folds(folder):
    config = TrainingConfig(data=folder, output="run")
    training, validation = split(config)
    assert sorted(names(training) + names(validation)) == list("012345")
    assert split(config.replace(fold=0)) == (training, validation)
    assert split(config.replace(fold=1))[1] != validation
    assert names(split(config.replace(fold="all"))[0]) == list("012345")
    assert split(config.replace(fold="all"))[1] == []
    with pytest.raises(InputError, match="fold"):
        split(config.replace(fold=7))


def test_what_a_run_learns_from(folder, tmp_path):
    config = TrainingConfig(data=folder, output=tmp_path / "run", crop="none", augment=False)
    data = load_training_data(config, ALONE, print)
    assert (len(data.training), len(data.validation), data.channels) == (4, 2, 1)
    assert data.augment is None
    assert data.organs == phantom.NAMES[1:]
    assert data.counts.sum() == sum(case.labels.size for case in data.training)
    assert (tmp_path / "run" / "cache").is_dir()


def test_the_files_of_a_case_are_read_once_to_tell_which_they_are(folder, tmp_path, monkeypatch):
    """For the cache and for the record, which a continued run compares with what is there now."""
    read = []
    for module in ("effseg.data.cache", "effseg.training.data", "effseg.training.runs"):
        counted = lambda case: read.append(case.name) or case_identity(case)  # noqa: E731
        monkeypatch.setattr(f"{module}.case_identity", counted)
    config = TrainingConfig(data=folder, output=tmp_path, crop="none")
    record = load_training_data(config, ALONE, print).record
    assert sorted(read) == sorted(record.files) == [f"phantom_00{i}" for i in range(6)]
    record.write(tmp_path)
    (tmp_path / "config.json").touch()
    del read[:]
    assert load_training_data(config, ALONE, print).resumed == record
    assert sorted(read) == sorted(record.files)
    assert len(list((tmp_path / "cache").glob("*.json"))) == 6


def test_organs_that_no_training_case_shows_are_named(folder, tmp_path):
    config = TrainingConfig(data=folder, output=tmp_path, crop="none", fold="all", labels="liver,spleen")
    data = load_training_data(config, ALONE, print)
    assert data.absent_organs == []
    data.counts[2] = 0
    assert data.absent_organs == ["spleen"]


def test_the_same_error_reaches_every_process(folder, tmp_path, monkeypatch):
    """The second of two processes meets a bad file: both end with its message."""
    error = "phantom_003: bad"
    worlds = [World(rank, 2, torch.device("cpu")) for rank in range(2)]

    def prepare(case, *arguments):
        if case.name == "phantom_003":
            raise InputError(error)

    monkeypatch.setattr("effseg.training.data.prepare_case", prepare)
    monkeypatch.setattr(World, "gather", lambda self, values: [error])
    config = TrainingConfig(data=folder, output=tmp_path, fold="all")
    for world in worlds:
        with pytest.raises(InputError, match=error):
            load_training_data(config, world, print)
