"""Labels from probabilities: of a network that saw the scan resampled, and of several networks."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nifti_files import save
from torch import nn

from effseg.cli import main
from effseg.data.labels import LabelMap
from effseg.data.nifti import Scan, read_image, read_labels
from effseg.data.preprocessing import Preprocessing
from effseg.data.resampling import resample_linear
from effseg.errors import InputError
from effseg.inference import Ensemble, Predictor, load_predictor, predict_files, segment_prepared
from effseg.inference.probabilities import Probabilities, most_probable
from effseg.models.base import SegmentationModel
from effseg.models.effsegnet import EffSegNet
from effseg.models.registry import build_model

NAMES = LabelMap(("background", "soft", "bone"), (0, 4, 300))
SHAPE = (24, 16, 12)


class Ramp(SegmentationModel):
    """Class 1 above an intensity and class 2 above another one, the softer the less `sharp`."""

    def __init__(self, first: float, second: float, sharp: float = 4.0) -> None:
        super().__init__("ramp", {"in_channels": 1, "num_classes": 3})
        self.edges = nn.Parameter(torch.tensor([first, second]))
        self.sharp = sharp

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        first, second = (self.sharp * (image - edge) for edge in self.edges)
        return torch.cat([torch.zeros_like(image), first, first + second], 1)


def ramp_scan(path: Path, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Scan:
    """HU from -300 to 500 along the first axis, of any voxel size."""
    array = np.broadcast_to(np.linspace(-300, 500, SHAPE[0])[:, None, None], SHAPE)
    return read_image(save(path, np.rint(array).astype(np.int16), np.diag([*spacing, 1.0])))


def plain(spacing: tuple[float, float, float] | None = None, **options: object) -> Preprocessing:
    return Preprocessing(window=(-1000.0, 1000.0), spacing=spacing, crop="none", **options)


def probabilities_of(model: SegmentationModel, scan: Scan) -> np.ndarray:
    """(K, X, Y, Z) on the scan's own grid, in float64."""
    image = plain().normalise(plain().prepare(scan).image)[None]
    with torch.no_grad():
        return model.double()(image.double()).softmax(1)[0].numpy()


@pytest.mark.parametrize("spacing", [(3.0, 1.0, 1.0), (0.4, 1.0, 1.0), (2.5, 2.0, 3.0)])
def test_a_resampled_scans_borders_are_finer_than_its_voxels(tmp_path, spacing):
    """The ramp is as linear on any grid: the labels are nearly those of the scan's own."""
    scan, model = ramp_scan(tmp_path / "scan.nii"), Ramp(0.05, 0.4)
    labels = Predictor(model, plain(spacing), NAMES)(scan)
    expected = NAMES.to_values(probabilities_of(model, scan).argmax(0))
    assert set(np.unique(labels)) == {0, 4, 300}
    planes = (labels != expected).any((1, 2)).sum()
    assert planes <= 1  # float16, and the volume's ends


def test_voted_labels_would_be_coarser(tmp_path):
    """What the test before would find of labels that are resampled."""
    scan, model, coarse = ramp_scan(tmp_path / "scan.nii"), Ramp(0.05, 0.4), plain((6.0, 1.0, 1.0))
    prepared = coarse.prepare(scan)
    expected = probabilities_of(model, scan).argmax(0)
    found = segment_prepared(model.float(), coarse, prepared)
    with torch.no_grad():
        labels = model(coarse.normalise(prepared.image)[None]).argmax(1)[0].numpy().astype(np.uint8)
    wrong = [(classes != expected).any((1, 2)).sum() for classes in (found, coarse.restore(labels, prepared))]
    assert wrong[0] < wrong[1]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("patch_size", [None, (8, 8, 8)])
def test_probabilities_are_averaged_on_the_scans_grid(tmp_path, bf16, patch_size):
    """Members that disagree, of which neither is right: the mean is known in float64."""
    scan = ramp_scan(tmp_path / "scan.nii")
    models = [Ramp(-0.1, 0.5, 1.0), Ramp(0.3, 0.6, 6.0), Ramp(0.2, 0.3, 2.0)]
    mean = np.mean([probabilities_of(model, scan) for model in models], axis=0)
    members = tuple(Predictor(model.float(), plain(), NAMES, patch_size, bf16) for model in models)
    labels = Ensemble(members)(scan)
    first, second = np.sort(mean, 0)[[-1, -2]]
    clear = first - second > 2 * (2**-7 if bf16 else 2**-11)
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(labels[clear], NAMES.to_values(mean.argmax(0))[clear])
    alone = [member(scan) for member in members]
    assert all((labels != one).any() for one in alone)


def test_members_may_have_crops_and_voxels_of_their_own(tmp_path):
    """Outside of its crop a member is sure of background."""
    array = np.full(SHAPE, -1000, np.int16)
    array[6:18, 4:12, 3:9] = 400
    scan = read_image(save(tmp_path / "scan.nii", array, np.eye(4)))
    everywhere = Ramp(-9.0, -8.0)  # bone, even in air
    cropped = Preprocessing(window=(-1000.0, 1000.0), margin=0.0)
    fine = Preprocessing(window=(-1000.0, 1000.0), spacing=(0.5, 0.5, 0.5), margin=0.0)
    members = tuple(Predictor(everywhere, how, NAMES) for how in (plain(), cropped, fine))
    body = array > -500
    np.testing.assert_array_equal(Ensemble(members[:1])(scan), np.full(SHAPE, 300))
    np.testing.assert_array_equal(Ensemble(members)(scan), np.where(body, 300, 0))
    np.testing.assert_array_equal(Ensemble(members[1:])(scan), np.where(body, 300, 0))


def test_it_is_the_mean_of_what_is_resampled():
    """Against a sum in float64: parts with grids and boxes of their own, and a class that one alone gives."""
    rng = np.random.default_rng(0)
    shape, classes = (11, 9, 8), 5
    boxes = [(slice(0, 11), slice(0, 9), slice(0, 8)), (slice(2, 9), slice(1, 9), slice(3, 7))]
    boxes.append((slice(4, 11), slice(0, 5), slice(0, 8)))
    parts, total = [], np.zeros((classes, *shape))
    for number, (box, grid) in enumerate(zip(boxes, [(11, 9, 8), (15, 4, 9), (3, 9, 2)], strict=True)):
        logits = rng.normal(size=(classes, *grid), scale=3.0)
        logits[4] = 10 if number == 1 else -50
        values = np.exp(logits) / np.exp(logits).sum(0)
        parts.append(Probabilities(values.astype(np.float16), box))
        inside = resample_linear(values.astype(np.float32), [side.stop - side.start for side in box])
        total[0] += 1
        total[(slice(None), *box)] += inside
        total[0][box] -= 1
    first, second = np.sort(total, 0)[[-1, -2]]
    clear = first - second > 3 * 2**-10
    expected = total.argmax(0)
    assert clear.mean() > 0.9
    assert (expected[clear] == 4).any()
    np.testing.assert_array_equal(most_probable(parts, shape)[clear], expected[clear])


def test_what_is_not_finite_is_refused(tmp_path):
    scan = ramp_scan(tmp_path / "scan.nii")
    for preprocessing in (plain((2.0, 1.0, 1.0)), plain()):
        bad = Predictor(Ramp(float("nan"), 0.5), preprocessing, NAMES)
        with pytest.raises(InputError, match=r"scan\.nii: the network gives probabilities that are not fini"):
            Ensemble((Predictor(Ramp(0.0, 0.5), plain(), NAMES), bad))(scan)


def test_the_first_of_even_classes_is_taken_and_many_have_room():
    box = (slice(1, 3), slice(0, 2), slice(0, 1))
    values = np.zeros((300, 2, 2, 1), np.float16)
    values[[0, 299], 0] = 0.5
    values[299, 1] = 1
    classes = most_probable([Probabilities(values, box)], (4, 2, 1))
    assert classes.dtype == np.int16
    assert classes[:, 0, 0].tolist() == [0, 0, 299, 0]


def test_the_largest_part_is_kept_of_the_mean(tmp_path):
    array = np.full(SHAPE, -1000, np.int16)
    array[2:10, 2:10, 2:10] = 900
    array[20, 12, 9] = 900
    scan = read_image(save(tmp_path / "scan.nii", array, np.eye(4)))
    members = (Predictor(Ramp(0.0, 0.5), plain(), NAMES), Predictor(Ramp(0.1, 0.6), plain(), NAMES))
    kept = np.where(array > 0, 300, 0)
    np.testing.assert_array_equal(Ensemble(members)(scan), kept)
    kept[20, 12, 9] = 0
    np.testing.assert_array_equal(Ensemble(members, largest_component=True)(scan), kept)


# Files


@pytest.fixture
def runs(tmp_path):
    """A folder of two runs, of other networks and voxel sizes."""
    for fold, spacing in enumerate((None, (2.0, 2.0, 2.0))):
        torch.manual_seed(fold)
        folder = tmp_path / "runs" / f"fold_{fold}"
        folder.mkdir(parents=True)
        (folder / "checkpoints").mkdir()
        network = build_model("effseg-tiny", 1, 3)
        network.save(folder / "final.safetensors", preprocessing=plain(spacing), labels=NAMES)
    (tmp_path / "runs" / "notes").mkdir()
    return tmp_path / "runs"


def test_a_folder_of_runs_is_an_ensemble(runs, tmp_path):
    scan = ramp_scan(tmp_path / "scan.nii.gz")
    both = load_predictor(runs)
    assert isinstance(both, Ensemble)
    assert [member.preprocessing.spacing for member in both.members] == [None, (2.0, 2.0, 2.0)]
    named = load_predictor([runs / "fold_1", runs / "fold_0" / "final.safetensors"])
    np.testing.assert_array_equal(both(scan), named(scan))
    assert both.fingerprint == named.fingerprint
    assert both.fingerprint != load_predictor(runs, largest_component=True).fingerprint
    assert isinstance(load_predictor([runs / "fold_1"]), Predictor)
    assert load_predictor(str(runs / "fold_1")).fingerprint == named.members[0].fingerprint
    (written,) = predict_files(both, tmp_path / "scan.nii.gz", tmp_path / "out")
    np.testing.assert_array_equal(read_labels(written), both(scan))
    assert predict_files(named, tmp_path / "scan.nii.gz", tmp_path / "out", resume=True) == []


def test_the_command_says_whom_it_averages(runs, tmp_path, capsys):
    ramp_scan(tmp_path / "scan.nii.gz")
    output = tmp_path / "out.nii.gz"
    words = ["predict", "--device", "cpu", "--input", str(tmp_path / "scan.nii.gz"), "--output", str(output)]
    assert main([*words, "--checkpoint", str(runs)]) == 0
    weights = [str(runs / f"fold_{fold}" / "final.safetensors") for fold in (0, 1)]
    assert capsys.readouterr().out.splitlines()[0] == f"averages 2 networks: {', '.join(weights)}"
    first = read_labels(output)
    assert main([*words, "--overwrite", "--checkpoint", weights[0], "--checkpoint", weights[1]]) == 0
    np.testing.assert_array_equal(read_labels(output), first)
    capsys.readouterr()
    assert main([*words, "--overwrite", "--checkpoint", weights[0]]) == 0
    assert "averages" not in capsys.readouterr().out
    shutil.rmtree(runs / "fold_0")
    assert main([*words, "--overwrite", "--checkpoint", str(runs)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"takes {weights[1]}"


def test_what_cannot_be_averaged_is_refused(runs, tmp_path):
    with pytest.raises(InputError, match=r"fold_0/final\.safetensors: the same network as .*fold_0/final"):
        load_predictor([runs, runs / "fold_0"])
    with pytest.raises(InputError, match=r"^checkpoint: expected files or folders, got none$"):
        load_predictor([])
    with pytest.raises(InputError, match=r"^expected networks to average, got none$"):
        Ensemble(())
    other = LabelMap(("background", "liver", "spleen"), (0, 4, 300))
    build_model("effseg-tiny", 1, 3).save(tmp_path / "o.safetensors", preprocessing=plain(), labels=other)
    with pytest.raises(InputError, match=r"o\.safetensors: expected networks for the same labels to average"):
        load_predictor([runs / "fold_0", tmp_path / "o.safetensors"])
    with pytest.raises(InputError, match=r"notes: a folder without best\.safetensors or final\.safetensors"):
        load_predictor(runs / "notes")
    build_model("effseg-tiny", 2, 3).save(tmp_path / "two.safetensors", preprocessing=plain(), labels=NAMES)
    with pytest.raises(InputError, match=r"expected networks of as many channels to average, got \[1, 2\]$"):
        load_predictor([runs / "fold_0", tmp_path / "two.safetensors"])


def test_runs_that_have_not_ended_are_refused(runs):
    """Unless they are named: a fold that still trains would be averaged as it happens to be."""
    (runs / "fold_1" / "final.safetensors").rename(runs / "fold_1" / "best.safetensors")
    with pytest.raises(InputError, match=r"fold_1: a run that has not ended, without final\.safetensors$"):
        load_predictor(runs)
    assert isinstance(load_predictor([runs / "fold_0", runs / "fold_1"]), Ensemble)
    (runs / "checkpoints").mkdir()  # so this is a run itself, whatever else lies in it
    with pytest.raises(InputError, match=r"runs: a folder without best\.safetensors or final\.safetensors"):
        load_predictor(runs)


def test_links_to_other_runs_do_not_count_twice(runs):
    (runs / "latest").symlink_to("fold_1")
    assert len(load_predictor(runs).members) == 2


def test_what_prediction_does_not_use_may_differ(runs, tmp_path):
    """A class that is ignored in training, and what the user says of a file that does not say it itself."""
    network = build_model("effseg-tiny", 1, 3)
    network.save(tmp_path / "a.safetensors", preprocessing=plain(), labels=LabelMap(*_parts(NAMES), ignore=9))
    network.head.bias.data += 1
    network.extra = {}
    network.save(tmp_path / "b.safetensors", labels=NAMES)
    with pytest.raises(InputError, match="without the preprocessing that prediction needs"):
        load_predictor([runs, tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    told = plain((3.0, 3.0, 3.0))
    both = load_predictor([runs, tmp_path / "a.safetensors", tmp_path / "b.safetensors"], preprocessing=told)
    spacings = [member.preprocessing.spacing for member in both.members]
    assert spacings == [None, (2.0, 2.0, 2.0), None, (3.0, 3.0, 3.0)]
    for options in ({"preprocessing": told}, {"labels": NAMES}):
        with pytest.raises(InputError, match=r"every network says its own, leave --\w+.* out$"):
            load_predictor([runs, tmp_path / "a.safetensors"], **options)


def _parts(label_map):
    return label_map.names, label_map.values


def test_networks_that_compute_something_else_are_told_apart():
    """By the same weights; how much memory a prediction takes changes nothing."""
    made = [
        Predictor(EffSegNet(1, 3, "tiny", **options), Preprocessing(), NAMES)
        for options in ({}, {"memory": "stream"}, {"norm": "group"})
    ]
    for predictor in made:
        predictor.model.load_state_dict(made[0].model.state_dict())
    first, streamed, other = (predictor.fingerprint for predictor in made)
    assert first == streamed != other
