"""Small model folders of nnU-Net's, trained for a moment on blobs, and scans for them."""

import copy
import json
from pathlib import Path

import nibabel
import numpy as np
import torch
from scipy import ndimage

FEATURES = [4, 8]


def configuration(patch, spacing, scheme="CTNormalization", **changes):
    """Of plans, with a U-Net of two stages."""
    flat = len(patch) == 2
    conv, norm = ("Conv2d", "InstanceNorm2d") if flat else ("Conv3d", "InstanceNorm3d")
    arguments = {
        "n_stages": 2, "features_per_stage": FEATURES, "conv_op": f"torch.nn.modules.conv.{conv}",
        "kernel_sizes": [[3] * len(patch)] * 2, "strides": [[1] * len(patch), [2] * len(patch)],
        "n_conv_per_stage": [1, 1], "n_conv_per_stage_decoder": [1], "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.{norm}", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None, "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    straight = {"order_z": 0, "force_separate_z": None}
    return {
        "data_identifier": "small", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
        "patch_size": list(patch), "median_image_size_in_voxels": list(patch), "spacing": list(spacing),
        "normalization_schemes": [scheme], "use_mask_for_norm": [scheme == "ZScoreNormalization"],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3} | straight,
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1} | straight,
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1} | straight,
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": arguments, "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    } | changes  # fmt: skip


def make_plans(entries, forward=(0, 1, 2), reader="SimpleITKIO", name="3d_fullres"):
    intensities = {"mean": 300.0, "std": 250.0, "percentile_00_5": -200.0, "percentile_99_5": 1200.0}
    return {
        "dataset_name": "Dataset001_Small", "plans_name": "nnUNetPlans", "image_reader_writer": reader,
        "transpose_forward": list(forward), "transpose_backward": [int(i) for i in np.argsort(forward)],
        "label_manager": "LabelManager", "experiment_planner_used": "ExperimentPlanner",
        "foreground_intensity_properties_per_channel": {"0": intensities},
        "configurations": {name: entries},
    }  # fmt: skip


LABELS = {"background": 0, "a": 1, "b": 2, "c": 3}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "centre": [3]}


def blobs(shape, seed, classes=4):
    """An image (z, y, x) whose intensity tells its label, 0 in a margin, and the labels."""
    random = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(random.normal(size=shape), [max(1, s / 12) for s in shape])
    edges = np.quantile(field, np.linspace(0, 1, classes + 1)[1:-1])
    labels = np.digitize(field, edges)
    image = np.rint(300.0 * labels + 40 * random.normal(size=shape) + 20).astype(np.int16)
    image[image == 0] = 1
    return image, labels


def write_scan(path, image, spacing):
    """image: (z, y, x); spacing: along them, in mm."""
    nibabel.save(nibabel.Nifti1Image(image.T, np.diag([*reversed(spacing), 1.0])), path)


def write_model(
    folder,
    plans,
    labels=LABELS,
    folds=(0,),
    mirror_axes=None,
    steps=60,
    trainer="nnUNetTrainer",
    ending=".nii.gz",
):
    """TRAINER__PLANS__CONFIGURATION with weights of a few steps on blobs, one seed a fold."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    folder = Path(folder)
    folder.mkdir(parents=True)
    dataset = {"labels": labels, "channel_names": {"0": "CT"}, "file_ending": ending}
    classes = 4
    if any(isinstance(value, list) for value in labels.values()):
        dataset["regions_class_order"] = [1, 2, 3]
        classes = 3
    (name,) = plans["configurations"]
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    manager = PlansManager(copy.deepcopy(plans))
    patch = plans["configurations"][name]["patch_size"]
    previous = 3 * ("previous_stage" in plans["configurations"][name])
    build = recursive_find_trainer_class_by_name(trainer).build_network_architecture
    for fold in folds:
        torch.manual_seed(fold)
        network = build(
            manager, manager.get_configuration(name), 1 + previous, classes, enable_deep_supervision=False
        )
        _train(network, patch, classes == 3, fold, steps, previous)
        (folder / f"fold_{fold}").mkdir()
        torch.save(
            {
                "network_weights": network.state_dict(), "optimizer_state": {}, "grad_scaler_state": None,
                "logging": {"dice": [np.float32(0.5), np.float64(0.25)], "best": np.array([1.0, 2.0])},
                "_best_ema": np.float64(0.5), "current_epoch": 1, "trainer_name": trainer,
                "init_args": {"plans": plans, "configuration": name, "fold": fold,
                              "dataset_json": dataset, "device": torch.device("cpu")},
                "inference_allowed_mirroring_axes": mirror_axes or tuple(range(len(patch))),
            },
            folder / f"fold_{fold}" / "checkpoint_final.pth",
        )  # fmt: skip
    return folder


def shifted(labels):
    """As a previous stage may have got them wrong."""
    return np.roll(labels, 2, -1)


def _train(network, patch, regional, seed, steps, previous=0):
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    size = [max(8, extent) for extent in patch]
    for step in range(steps):
        image, labels = blobs(size if len(size) == 3 else [2, *size], 100 * seed + step % 4)
        x = torch.from_numpy((np.clip(image, -200, 1200) - 300) / 250).float()[None, None]
        target = torch.from_numpy(labels)[None]
        if len(size) == 2:
            x, target = x[0].movedim(1, 0), target[0]
        if previous:
            stage = torch.from_numpy(shifted(labels))[None]
            x = torch.cat([x, *(stage[None] == label for label in (1, 2, 3))], 1)
        logits = network(x)
        if regional:
            wanted = torch.stack([target > level for level in range(3)], 1).float()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted)
        else:
            loss = torch.nn.functional.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def nnunets_labels(
    model, scans, output, folds=(0,), mirror=True, save_probabilities=False, exact=False, previous=None
):
    """Labels that nnU-Net's own predictor writes, by name; exact: with its sums of logits in float32."""
    import nnunetv2.inference.predict_from_raw_data as theirs

    predictor = theirs.nnUNetPredictor(
        use_mirroring=mirror, device=torch.device("cpu"), allow_tqdm=False, perform_everything_on_device=False
    )
    predictor.initialize_from_trained_model_folder(str(model), folds)
    output.mkdir(exist_ok=True)
    half = torch.half
    torch.half = torch.float if exact else half
    try:
        predictor.predict_from_files_sequential(str(scans), str(output), save_probabilities, True, previous)
    finally:
        torch.half = half
    return {path.name: read_labels(path) for path in sorted(output.glob("*.nii.gz"))}


def read_labels(path):
    return np.asarray(nibabel.load(path).dataobj).T
