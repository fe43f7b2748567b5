"""effseg predict: label files for new scans."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from effseg.commands.options import add_spacing, add_window, three, window
from effseg.errors import InputError

if TYPE_CHECKING:
    import torch

    from effseg.data.labels import Labels
    from effseg.data.nifti import Scan
    from effseg.data.preprocessing import Preprocessing

HELP = """Segment CT scans with a trained network. INPUT is a scan or a folder of scans: NAME.nii.gz,
NAME_ct.nii.gz, or nnU-Net's NAME_0000.nii.gz, NAME_0001.nii.gz (a file a channel; four digits are a channel
where NAME_0000 stands beside, or dataset.json has channel_names). Scans of a folder that are missing or
damaged are listed at the end. Each scan goes through the network as a whole; its labels are written on its
own grid, with the values of the training's label files."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help="a run's folder (its best network is taken, else its final one) or a .safetensors file of it; "
        "several, or a folder of runs, to average their probabilities",
    )
    parser.add_argument(
        "--input", type=Path, required=True, metavar="PATH", help="a scan, or a folder of scans"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help="a folder for NAME.nii.gz; for one scan also a file name",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="compute in bf16 under autocast or in fp32 (default: bf16 on a GPU, fp32 on a CPU)",
    )
    parser.add_argument(
        "--largest-component",
        action="store_true",
        help="keep only the largest connected part of every organ",
    )
    parser.add_argument(
        "--split-volume",
        action="store_true",
        help="the processes of torchrun share each scan, each with its part of the memory",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace label files that exist")
    existing.add_argument(
        "--continue",
        dest="resume",
        action="store_true",
        help="leave label files that this network has made of these scans before",
    )
    title = "for a network whose file does not say them, such as one saved in Python without"
    _add_settings(parser.add_argument_group(title))


def _add_settings(group: argparse._ArgumentGroup) -> None:
    add_window(group, "intensity window that it was trained with, in HU; repeated, one for each channel")
    add_spacing(group)
    group.add_argument(
        "--crop", choices=("body", "none"), help="crop scans to the body, as training does (default: none)"
    )
    group.add_argument(
        "--labels",
        help="names of the classes above background: liver,spleen; or with their values in label files, "
        "1:liver,5:spleen; or a folder with a dataset.json or labels.json",
    )
    group.add_argument(
        "--patch-size",
        type=int,
        nargs="+",
        metavar="VOXELS",
        help="a sliding window of this size, one number or three (right, anterior, superior axis; "
        "default: whole volumes)",
    )


def run(args: argparse.Namespace) -> int:
    from effseg.common.device import keep_freed_memory
    from effseg.training.distributed import join_world

    keep_freed_memory()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and not args.split_volume:
        raise InputError("split_volume: expected --split-volume under torchrun, got none")
    with join_world(args.device, processes) as world, world.splitting():
        _predict(args, world.device, world.is_main)
    return 0


def _predict(args: argparse.Namespace, device: "torch.device", is_main: bool) -> None:
    """is_main: whether this process writes and tells."""
    from effseg.inference import Ensemble, load_predictor, predict_files, weights_files

    weights = [path for checkpoint in args.checkpoint for path in weights_files(checkpoint)]
    predictor = load_predictor(
        weights,
        device,
        bf16=args.dtype == "bf16" or (args.dtype == "auto" and device.type == "cuda"),
        largest_component=args.largest_component,
        preprocessing=_preprocessing(args),
        labels=None if args.labels is None else _labels(args.labels),
        patch_size=three(args.patch_size, "patch-size"),
    )
    members = predictor.members if isinstance(predictor, Ensemble) else (predictor,)
    if args.split_volume and any(member.patch_size for member in members):
        raise InputError("split_volume: expected networks trained on whole volumes, got one for patches")
    given = args.checkpoint[0]
    if is_main and (len(weights) > 1 or weights[0].parent not in (given, given.parent)):
        averages = f"averages {len(weights)} networks: " if len(weights) > 1 else "takes "
        print(averages + ", ".join(map(str, weights)), flush=True)
    predict_files(
        predictor,
        args.input,
        args.output,
        overwrite=args.overwrite,
        resume=args.resume,
        writes=is_main,
        on_case=_tell,
        say=lambda text: print(text, flush=True) if is_main else None,
    )


def _preprocessing(args: argparse.Namespace) -> "Preprocessing | None":
    """As the options tell it; None where they tell nothing."""
    from effseg.data.preprocessing import Preprocessing

    if args.window is None:
        if args.spacing is not None or args.crop is not None:
            raise InputError("window: expected two HU values beside --spacing or --crop, got none")
        return None
    spacing = three(args.spacing, "spacing")
    return Preprocessing(window=window(args.window), spacing=spacing, crop=args.crop or "none")


def _labels(text: str) -> "Labels":
    from effseg.data.description import FILES, same_text
    from effseg.data.labels import load_label_map

    if text and any((Path(text) / name).is_file() for name in FILES):
        return load_label_map(text)
    names = [name.strip() for name in same_text(text).split(",")]
    pairs = [(value.strip(), name.strip()) for value, colon, name in (name.partition(":") for name in names)]
    numbered = [value.isdecimal() and bool(name) for value, name in pairs]
    values = [int(value) for (value, _), number in zip(pairs, numbered, strict=True) if number]
    mixed = any(numbered) != all(numbered) or len(set(values)) < len(values)
    if mixed or not all(names) or text.endswith(".json"):
        expected = "names, or different values with names as 1:liver,5:spleen, or a folder with dataset.json"
        raise InputError(f"labels: expected {expected} or labels.json, got {text!r}")
    return {int(value): name for value, name in pairs} if any(numbered) else names


def _tell(path: Path, scan: "Scan", seconds: float) -> None:
    size = "x".join(map(str, scan.grid.shape))
    print(f"{path}: {size} voxels in {seconds:.1f} s", flush=True)
