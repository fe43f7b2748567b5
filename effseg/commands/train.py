"""effseg train: learn to segment from CT volumes with label maps."""

import argparse
import os
from pathlib import Path

from effseg.commands.options import add_spacing, add_window, three, window
from effseg.errors import InputError

HELP = """Train a network on whole CT volumes. DATA holds nnU-Net's layout (imagesTr/NAME_0000.nii.gz,
labelsTr/NAME.nii.gz, dataset.json) or pairs NAME_ct.nii.gz, NAME_seg.nii.gz with labels.json. A run that was
stopped continues with the same command. Several GPUs: torchrun --nproc-per-node N -m effseg train ..."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="volumes and labels")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="RUN", help="the run's folder: weights, logs, pictures"
    )
    _add_data(parser.add_argument_group("cases, labels, preprocessing"))
    _add_network(parser.add_argument_group("network and loss"))
    _add_course(parser.add_argument_group("course of the training"))


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from effseg.common.device import keep_freed_memory
    from effseg.training import TrainingConfig, train

    keep_freed_memory()
    values = vars(args).copy()
    overwrite = values.pop("overwrite")
    for name in ("patch_size", "spacing"):
        values[name] = three(values[name], name)
    given = window(values.pop("window"))
    if given is not None:
        values["window"] = given
    config = TrainingConfig.from_dict({name: values[name] for name in values if name != "run"})
    try:
        train(config, overwrite=overwrite, console=Console())
    except InputError:
        if int(os.environ.get("RANK", "0")) != 0:  # every process meets the same error: the first one tells
            return 2
        raise
    return 0


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--cases", help="cases to use, e.g. case001-case016,case020 or 'ct_*' (default: all)")
    group.add_argument(
        "--validation",
        metavar="CASES",
        help="cases that validate and never train (default: a fold of --cases)",
    )
    group.add_argument(
        "--fold",
        type=_fold,
        help="fold of splits_final.json or of nnU-Net's five-fold split that validates (default: 0); "
        "all: train on every case, no validation",
    )
    group.add_argument(
        "--allow-missing",
        action="store_true",
        help="go on without cases of which files are missing or unreadable, and say which",
    )
    group.add_argument(
        "--labels",
        help="what to learn: a group of labels.json, GROUP:organ,organ or organ,organ (all)",
    )
    add_window(
        group, "intensity window in HU of the CT channels (default: -200 400); repeated, one for each channel"
    )
    add_spacing(group)
    group.add_argument(
        "--crop", choices=("body", "none"), default="body", help="crop volumes to the body (default: body)"
    )
    group.add_argument(
        "--margin", type=float, default=5.0, metavar="MM", help="kept around the body, in mm (default: 5)"
    )
    group.add_argument(
        "--patch-size",
        type=int,
        nargs="+",
        metavar="VOXELS",
        help="train on random patches of this size, one number or three (right, anterior, superior axis), "
        "and validate by a sliding window (default: whole volumes)",
    )
    group.add_argument(
        "--no-augment",
        dest="augment",
        action="store_false",
        help="leave out random affine maps, intensities, noise",
    )
    group.add_argument(
        "--augment-strength",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="of these changes' ranges, at most 4; for few cases more may be better (default: 1)",
    )
    group.add_argument(
        "--augment-on",
        choices=("auto", "cpu", "device"),
        default="auto",
        help="where volumes are augmented: in the threads that prepare them, or where the network is "
        "(default: device on a GPU, cpu on a CPU); their noise differs",
    )

    group.add_argument(
        "--mirror",
        choices=("none", "left-right"),
        default="none",
        help="mirror every second volume left to right, too (default: none)",
    )
    group.add_argument(
        "--mirror-pairs",
        metavar="A:B,...",
        help="labels that change places in a mirrored volume; none: no label has a side (default: "
        "mirror_pairs of dataset.json or labels.json)",
    )


def _add_network(group: argparse._ArgumentGroup) -> None:
    from effseg.models.registry import MODEL_NAMES

    group.add_argument(
        "--model", choices=MODEL_NAMES, default="effseg-base", help="network (default: effseg-base)"
    )
    group.add_argument(
        "--init",
        type=Path,
        metavar="PATH",
        help="begin with these weights: a .safetensors file or a run's folder (default: random ones)",
    )
    group.add_argument(
        "--norm",
        choices=("instance", "batch", "group"),
        default="instance",
        help="normalisation of effseg networks",
    )
    group.add_argument(
        "--memory",
        choices=("auto", "raw", "stream"),
        default="auto",
        help="what effseg networks keep for backward: raw (faster), stream (least), or what fits the GPU or "
        "--memory-budget (default: auto; raw on a CPU without a budget)",
    )
    group.add_argument("--memory-budget", metavar="SIZE", help="for auto, such as 24GB (default: the GPU's)")
    group.add_argument(
        "--recompute", type=int, default=0, metavar="LEVELS", help="levels to run again in backward"
    )
    group.add_argument(
        "--offload",
        action="store_true",
        help="keep the half-resolution level in the host's memory, pinned, with memory stream or, where that "
        "is needed, auto: for cards with a fast link",
    )
    group.add_argument(
        "--class-weights",
        choices=("sqrt", "none"),
        default="sqrt",
        help="cross-entropy weights: 1/sqrt(class frequency) or none (default: sqrt)",
    )
    group.add_argument("--dice-weight", type=float, default=1.0, help="weight of the Dice loss (default: 1)")
    group.add_argument("--ce-weight", type=float, default=1.0, help="weight of cross-entropy (default: 1)")
    group.add_argument("--label-smoothing", type=float, default=0.0, help="of the cross-entropy, 0 to 1")
    group.add_argument("--include-background", action="store_true", help="count background in the Dice loss")
    group.add_argument(
        "--batch-dice", action="store_true", help="take Dice over the batch, not over each volume"
    )


def _add_course(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--steps", type=int, default=2000, help="optimiser steps (default: 2000)")
    group.add_argument("--epochs", type=int, help="passes over the training cases, instead of --steps")
    group.add_argument("--batch-size", type=int, default=1, help="volumes per process and step (default: 1)")
    group.add_argument(
        "--split-volume",
        type=int,
        default=1,
        metavar="PROCESSES",
        help="processes of torchrun's that share a volume, each with its part of the memory (default: 1)",
    )
    group.add_argument(
        "--learning-rate",
        type=float,
        help="peak rate of AdamW (default: 4e-3 for effseg networks, 1e-3 for unet3d)",
    )
    group.add_argument("--weight-decay", type=float, default=1e-4, help="of AdamW (default: 1e-4)")
    group.add_argument(
        "--warmup",
        type=float,
        default=0.08,
        help="share of the steps with a rising rate (default: 0.08)",
    )
    group.add_argument("--clip-norm", type=float, default=5.0, help="largest gradient norm (default: 5)")
    group.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="compute in bf16 under autocast or in fp32 (default: bf16 on a GPU, fp32 on a CPU)",
    )
    group.add_argument(
        "--ema",
        type=float,
        default=0.0,
        metavar="DECAY",
        help="save a running mean of weights, e.g. 0.999",
    )
    group.add_argument(
        "--validation-interval", type=int, default=100, metavar="STEPS", help="steps between validations"
    )
    group.add_argument(
        "--checkpoint-interval", type=int, default=100, metavar="STEPS", help="steps between checkpoints"
    )
    group.add_argument("--seed", type=int, default=0, help="of every random choice (default: 0)")
    group.add_argument("--workers", type=int, default=1, help="threads that prepare batches (default: 1)")
    group.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="prepared volumes, for several runs (default: RUN/cache)",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    group.add_argument("--overwrite", action="store_true", help="begin anew where RUN holds a run already")


def _fold(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
