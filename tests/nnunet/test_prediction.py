"""Labels of model folders against nnU-Net's own predictor, on a CPU in float32."""

import io
import json
import math
import os
import re
import shutil
from contextlib import redirect_stdout

import nnunet_models as models
import numpy as np
import pytest
import torch

from effseg.errors import InputError
from effseg.nnunet import Predictor
from effseg.nnunet.prediction.cases import Scan
from effseg.nnunet.prediction.preprocessing import nonzero_box, with_own_first_axis

ISO, OWN = (1.5, 1.5, 1.5), (1.1, 0.9, 0.9)
TORCH = {
    "resampling_fn_probabilities": "resample_torch_fornnunet",
    "resampling_fn_probabilities_kwargs": {
        "is_seg": False, "force_separate_z": None, "memefficient_seg_resampling": False,
    },
}  # fmt: skip

# name: patch, the model's spacing, the scan's shape and spacing, and what else differs
CASES = {
    "isotropic": ((16, 16, 16), ISO, (30, 34, 28), OWN, {}),
    "thick slices": ((8, 16, 16), (5.0, 1.0, 1.0), (24, 34, 28), (3.5, 0.8, 0.8), {"reader": "NibabelIO"}),
    "2d": ((16, 16), (1.2, 1.2), (8, 34, 28), (3.0, 0.8, 0.8), {"name": "2d"}),
    "regions, transposed, cropped": (
        (16, 16, 12), (1.5, 1.2, 1.5), (30, 34, 28), (1.1, 0.9, 0.7),
        {"labels": models.REGIONS, "forward": (2, 0, 1), "margin": 4},
    ),
    "thin, folds": ((16, 16, 16), ISO, (5, 34, 28), OWN, {"folds": (0, 1)}),
}  # fmt: skip
SLOW_CASES = {
    "no resampling": ((16, 16, 16), (1.0, 1.0, 1.0), (30, 34, 36), (1.0, 1.0, 1.0), {}),
    "thick model and scan": ((8, 16, 16), (5.0, 1.0, 1.0), (14, 44, 40), (5.0, 0.8, 0.8), {}),
    "thick along the last axis": ((16, 16, 8), (1.0, 1.0, 5.0), (40, 44, 24), (0.8, 0.8, 3.5), {}),
    "3d_lowres": ((16, 16, 16), (2.5, 2.5, 2.5), (50, 60, 60), (1.0, 1.0, 1.0), {"name": "3d_lowres"}),
    "z-score within a mask": (
        (16, 16, 16), ISO, (40, 44, 36), OWN, {"scheme": "ZScoreNormalization", "margin": 5},
    ),
    "nnU-Net's resampling by torch": (
        (8, 16, 16), (5.0, 1.0, 1.0), (24, 44, 40), (3.5, 0.8, 0.8), {"changes": TORCH},
    ),
    "tall windows": ((24, 8, 12), ISO, (41, 44, 36), OWN, {}),
    "window as large as the scan": ((32, 32, 32), ISO, (24, 30, 28), OWN, {}),
    "a 2d scan of one slice": ((16, 16), (1.2, 1.2), (1, 44, 40), (3.0, 0.8, 0.8), {"name": "2d"}),
}  # fmt: skip
ROUNDING = 2.0**-8  # of logits whose float16 sums have a few roundings of 2**-11


def made(folder, patch, spacing, shape, own, changes):
    """A model and a folder with one scan."""
    entries = models.configuration(
        patch, spacing, changes.get("scheme", "CTNormalization"), **changes.get("changes", {})
    )
    plans = models.make_plans(
        entries, changes.get("forward", (0, 1, 2)), changes.get("reader", "SimpleITKIO"),
        changes.get("name", "3d_fullres"),
    )  # fmt: skip
    folds = changes.get("folds", (0,))
    model = models.write_model(folder / "model", plans, changes.get("labels", models.LABELS), folds)
    image = models.blobs(shape, seed=7)[0]
    if margin := changes.get("margin"):
        inside = np.zeros_like(image)
        cut = (slice(margin, -margin), slice(margin, -margin - 2), slice(margin + 1, -margin))
        inside[cut] = image[cut]
        inside[15:18, 15:18, 15:18] = 0  # a hole
        image = inside
    (folder / "scans").mkdir()
    models.write_scan(folder / "scans" / "a_0000.nii.gz", image, own)
    return model, folder / "scans", folds


def compare(tmp_path, case, mirror):
    model, scans, folds = made(tmp_path, *case)
    with redirect_stdout(io.StringIO()):
        exact, theirs = (
            models.nnunets_labels(model, scans, tmp_path / str(sums), folds, mirror, exact=sums)["a.nii.gz"]
            for sums in (True, False)
        )
    predictor = Predictor(model, folds, device="cpu", mirror=mirror)
    (path,) = predictor.predict_folder(scans, tmp_path / "ours", save_probabilities=True)
    labels = models.read_labels(path)
    assert labels.dtype == theirs.dtype
    assert len(np.unique(theirs)) >= 3
    assert np.mean(labels == exact) >= 0.9999, "nnU-Net with sums in float32"
    probabilities = np.load(tmp_path / "ours" / "a.npz")["probabilities"]
    assert np.isfinite(probabilities).all()
    if not predictor.model.labels.has_regions:
        _, spacing, _, own, _ = case
        check_ties(labels, theirs, probabilities, inside(scans / "a_0000.nii.gz", spacing, own))
    assert np.mean(labels == theirs) >= 0.995, "of which blobs have many: one voxel of five is at a border"


def check_ties(labels, theirs, probabilities, inner):
    """Where nnU-Net's float16 sums give another label, the two have nearly the same logits."""
    labels, theirs, probabilities = labels[inner], theirs[inner], probabilities[(slice(None), *inner)]
    logits = np.log(probabilities.clip(1e-12))
    where = (labels != theirs).nonzero()
    ours, others = (logits[(found[where].astype(int), *where)] for found in (labels, theirs))
    assert (ours - others <= ROUNDING * np.ptp(logits, axis=0).max()).all()


def inside(scan, spacing, own):
    """The crop without a border of three voxels of the network's: at the scan's edges nnU-Net's float16
    weights are subnormal, and its logits are off by up to a half."""
    box = nonzero_box(models.read_labels(scan)[None])
    inner = []
    for (low, high), coarse, fine in zip(box, with_own_first_axis(spacing, own), own, strict=True):
        border = math.ceil(3 * max(1, coarse / fine))
        inner.append(slice(low + border, high - border) if high - low > 3 * border else slice(low, high))
    return tuple(inner)


@pytest.mark.parametrize("name", CASES)
def test_labels(tmp_path, name):
    compare(tmp_path, CASES[name], mirror=name in ("isotropic", "2d"))


@pytest.mark.slow
@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("name", CASES | SLOW_CASES)
def test_labels_of_more_cases(tmp_path, name, mirror):
    compare(tmp_path, (CASES | SLOW_CASES)[name], mirror)


def residual(entries):
    entries["architecture"]["network_class_name"] = (
        "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    )
    arguments = entries["architecture"]["arch_kwargs"]
    arguments["n_blocks_per_stage"] = arguments.pop("n_conv_per_stage")


def of_nnunet_2_2(entries):
    """Plans that do not name a network's parts."""
    del entries["architecture"]
    entries |= {
        "UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 4, "unet_max_num_features": 320,
        "n_conv_per_stage_encoder": [1, 1], "n_conv_per_stage_decoder": [1], "num_pool_per_axis": [1, 1, 1],
        "pool_op_kernel_sizes": [[1, 1, 1], [2, 2, 2]], "conv_kernel_sizes": [[3, 3, 3]] * 2,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # nnU-Net imports every trainer there is, and tells of old plans
@pytest.mark.parametrize(
    ("trainer", "change"),
    [
        ("nnUNetTrainerBN", lambda entries: None),
        ("nnUNetTrainer_5epochs", residual),
        ("nnUNetTrainer", of_nnunet_2_2),
    ],
    ids=["batch norm", "residual encoder", "old plans"],
)
def test_other_networks(tmp_path, trainer, change):
    entries = models.configuration((16, 16, 16), ISO)
    change(entries)
    model = models.write_model(tmp_path / "model", models.make_plans(entries), steps=20, trainer=trainer)
    (tmp_path / "scans").mkdir()
    models.write_scan(tmp_path / "scans" / "a_0000.nii.gz", models.blobs((20, 34, 28), 7)[0], OWN)
    with redirect_stdout(io.StringIO()):
        theirs = models.nnunets_labels(model, tmp_path / "scans", tmp_path / "theirs", exact=True)["a.nii.gz"]
    found = Predictor(model, device="cpu").predict_file([tmp_path / "scans" / "a_0000.nii.gz"])
    assert np.mean(found == theirs) >= 0.9999
    assert len(np.unique(theirs)) > 1


@pytest.mark.slow
def test_flat_images(tmp_path):
    from skimage import io as images

    entries = models.configuration((16, 16), (1.0, 1.0))
    plans = models.make_plans(entries, reader="NaturalImage2DIO", name="2d")
    model = models.write_model(tmp_path / "model", plans, ending=".png")
    (tmp_path / "scans").mkdir()
    image = (models.blobs((1, 50, 60), 7)[0][0] / 5).clip(0, 255).astype(np.uint8)
    images.imsave(tmp_path / "scans" / "a_0000.png", image, check_contrast=False)
    with redirect_stdout(io.StringIO()):
        models.nnunets_labels(model, tmp_path / "scans", tmp_path / "theirs", exact=True)
    (path,) = Predictor(model, device="cpu").predict_folder(tmp_path / "scans", tmp_path / "ours")
    found, theirs = images.imread(path), images.imread(tmp_path / "theirs" / "a.png")
    assert found.shape == image.shape
    np.testing.assert_array_equal(found, theirs)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model without training, and scans a, b, c; c is damaged."""
    folder = tmp_path_factory.mktemp("small")
    model = models.write_model(
        folder / "model", models.make_plans(models.configuration((8, 8, 8), ISO)), steps=0
    )
    (folder / "scans").mkdir()
    for seed, name in enumerate("ab"):
        image = models.blobs((10, 12, 14), seed)[0]
        models.write_scan(folder / "scans" / f"{name}_0000.nii.gz", image, OWN)
    (folder / "scans" / "c_0000.nii.gz").write_bytes(b"no scan")
    return model, folder / "scans"


def test_probabilities_are_nnunets(tmp_path):
    model, scans, _ = made(tmp_path, *CASES["regions, transposed, cropped"])
    with redirect_stdout(io.StringIO()):
        models.nnunets_labels(
            model, scans, tmp_path / "theirs", mirror=False, save_probabilities=True, exact=True
        )
    Predictor(model, device="cpu", mirror=False).predict_folder(
        scans, tmp_path / "ours", save_probabilities=True
    )
    ours, theirs = (np.load(tmp_path / name / "a.npz")["probabilities"] for name in ("ours", "theirs"))
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)
    kept = [np.load(tmp_path / name / "a.pkl", allow_pickle=True).keys() for name in ("ours", "theirs")]
    assert kept[0] == kept[1]


def test_a_bad_scan_does_not_stop_the_others(small, tmp_path):
    model, scans = small
    predictor = Predictor(model, device="cpu", mirror=False)
    with pytest.raises(InputError, match=r"1 of 3 scans .*c_0000\.nii\.gz: damaged or truncated"):
        predictor.predict_folder(scans, tmp_path)
    assert {path.name for path in tmp_path.glob("*.nii.gz")} == {"a.nii.gz", "b.nii.gz"}
    assert {path.name for path in tmp_path.glob("*.json")} == {"dataset.json", "plans.json"}


def test_a_volume_of_another_name_is_told(small, tmp_path):
    model, scans = small
    (tmp_path / "in").mkdir()
    for name in ("a_0000.nii.gz", "b.nii.gz", "a.nii.gz"):
        shutil.copy(scans / "a_0000.nii.gz", tmp_path / "in" / name)
    predictor = Predictor(model, device="cpu", mirror=False)
    with pytest.raises(InputError, match=r"1 of 2 scans .*b\.nii\.gz: expected the name NAME_0000\.nii\.gz"):
        predictor.predict_folder(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["a.nii.gz"]


def test_a_writers_second_file_has_the_scans_name(small, tmp_path):
    """The spacing of a TIFF lies in a file of its own."""
    from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

    predictor = Predictor(small[0], device="cpu")
    predictor.reader, predictor.model.dataset["file_ending"] = Tiff3DIO(), ".tif"
    labels, spacing = np.ones((2, 3, 4), np.uint8), (5.0, 0.7, 0.7)
    predictor._write(Scan((), tmp_path / "case"), labels, {"spacing": spacing}, False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["case.json", "case.tif"]
    read, properties = Tiff3DIO().read_seg(str(tmp_path / "case.tif"))
    np.testing.assert_array_equal(read[0], labels)
    assert tuple(properties["spacing"]) == spacing


def test_a_fold_that_is_not_trained_is_told(small, tmp_path):
    model = changed(small, tmp_path)
    (model / "fold_3").mkdir()
    with pytest.raises(InputError, match=r"no checkpoint_final\.pth in fold_3: name the folds to use, -f 0"):
        Predictor(model, device="cpu")
    assert Predictor(model, [0], device="cpu").model.folds == [0]


def test_resumed_and_in_parts(small, tmp_path):
    model, scans = small
    predictor = Predictor(model, device="cpu", mirror=False)
    (first,) = predictor.predict_folder(scans, tmp_path, part=0, parts=3, ahead=False)
    assert first.name == "a.nii.gz"
    before = first.stat().st_mtime_ns
    with pytest.raises(InputError, match="1 of 2 scans"):
        predictor.predict_folder(scans, tmp_path, resume=True)
    assert first.stat().st_mtime_ns == before
    assert (tmp_path / "b.nii.gz").is_file()


def test_an_array_is_like_a_file(small, tmp_path):
    model, scans = small
    predictor = Predictor(model, device="cpu", mirror=False)
    image = models.read_labels(scans / "a_0000.nii.gz")
    of_file = predictor.predict_file([scans / "a_0000.nii.gz"])
    np.testing.assert_array_equal(predictor(image[None], OWN), of_file)
    with pytest.raises(InputError, match="image: expected"):
        predictor(image, OWN)
    with pytest.raises(InputError, match="finite intensities"):
        predictor(np.full((1, 9, 9, 9), np.nan), OWN)


def test_networks_without_conversion_and_in_batches(small):
    model, scans = small
    found = [
        Predictor(model, device="cpu", **options).predict_file([scans / "b_0000.nii.gz"])
        for options in ({}, {"converted": False}, {"batch": 3})
    ]
    assert np.mean(found[0] == found[1]) > 0.999
    assert np.mean(found[0] == found[2]) > 0.999


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_types_of_16_bits(small, dtype):
    model, scans = small
    full, half = (
        Predictor(model, device="cpu", mirror=False, dtype=name).predict_file([scans / "b_0000.nii.gz"])
        for name in ("fp32", dtype)
    )
    assert np.mean(full == half) > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype: expected auto, fp16, bf16, fp32, got 'int8'"),
        ({"step": 0}, "step: expected more than 0"),
        ({"step": 1.5}, "step: expected more than 0"),
        ({"batch": 0}, "batch: expected 1 or more"),
        ({"folds": []}, "folds: expected at least one"),
        ({"folds": [3]}, "fold_3/checkpoint_final.pth: no such checkpoint"),
        ({"checkpoint": "best.pth"}, "no fold_N with a best.pth"),
        ({"device": "tpu"}, "device: expected auto"),
    ],
)
def test_options_out_of_range(small, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Predictor(small[0], **({"device": "cpu"} | options))


def changed(small, tmp_path, plans=lambda plans: None, checkpoint=lambda checkpoint: None):
    """A copy of the small model after changes."""
    model, _ = small
    (tmp_path / "model" / "fold_0").mkdir(parents=True)
    entries = json.loads((model / "plans.json").read_text())
    plans(entries)
    (tmp_path / "model" / "plans.json").write_text(json.dumps(entries))
    (tmp_path / "model" / "dataset.json").write_text((model / "dataset.json").read_text())
    saved = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)
    checkpoint(saved)
    torch.save(saved, tmp_path / "model" / "fold_0" / "checkpoint_final.pth")
    return tmp_path / "model"


def of_configuration(**changes):
    return lambda plans: plans["configurations"]["3d_fullres"].update(changes)


def architecture(**changes):
    return lambda plans: plans["configurations"]["3d_fullres"]["architecture"].update(changes)


REFUSED = {
    "trainer": ({"checkpoint": lambda saved: saved.update(trainer_name="MyTrainer")}, "got 'MyTrainer'"),
    "whole volumes": (
        {"checkpoint": lambda saved: saved.update(trainer_name="nnUNetTrainerEffSegFull")}, "whole volumes",
    ),
    "preprocessor": ({"plans": of_configuration(preprocessor_name="Mine")}, "preprocessor_name"),
    "resampling": ({"plans": of_configuration(resampling_fn_probabilities="mine")}, "resampling_fn_prob"),
    "order": (
        {"plans": of_configuration(resampling_fn_probabilities_kwargs={"order": 3})}, "order: expected",
    ),
    "network": ({"plans": architecture(network_class_name="os.system")}, "network_class_name"),
    "parts": ({"plans": architecture(_kw_requires_import=["n_stages"])}, "arch_kwargs"),
    "weights": ({"checkpoint": lambda saved: saved["network_weights"].popitem()}, "do not fit"),
    "configuration": (
        {"checkpoint": lambda saved: saved["init_args"].update(configuration="3d")}, "3d not found in plans",
    ),
    "axes": ({"checkpoint": lambda saved: saved.update(inference_allowed_mirroring_axes=(3,))}, "0 to 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(small, tmp_path, name):
    changes, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as error:
        Predictor(changed(small, tmp_path, **changes), device="cpu")
    assert "\n" not in str(error.value)


def test_other_normalisation(small, tmp_path):
    model = changed(small, tmp_path, plans=of_configuration(normalization_schemes=["Mine"]))
    with pytest.raises(InputError, match=r"normalization_schemes.*'Mine'"):
        Predictor(model, device="cpu").predict_file([small[1] / "a_0000.nii.gz"])


@pytest.mark.parametrize("trainer", ["nnUNetTrainerEffSeg", "nnUNetTrainerNoMirroring"])
def test_stock_trainers_share_the_plans_network(small, tmp_path, trainer):
    model = changed(small, tmp_path, checkpoint=lambda saved: saved.update(trainer_name=trainer))
    assert len(Predictor(model, device="cpu").model.networks) == 1


def test_code_in_a_checkpoint_is_not_run(small, tmp_path, capsys):
    from effseg import cli

    class Command:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trap"),)

    model = changed(small, tmp_path, checkpoint=lambda saved: saved.update(logging=Command()))
    command = ["nnunet", "predict", "-i", str(small[1]), "-o", str(tmp_path / "out"), "-m", str(model)]
    assert cli.main(command) == 2
    told = capsys.readouterr().err
    assert told.startswith("effseg: error: ")
    assert "refused: it names" in told
    assert told.count("\n") == 1
    assert not (tmp_path / "trap").exists()
