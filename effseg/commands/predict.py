"""effseg predict: label files for new scans."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effseg.data.nifti import Scan

HELP = """Segment CT scans with a trained network. INPUT is a scan or a folder of scans: NAME.nii.gz,
NAME_ct.nii.gz, or nnU-Net's NAME_0000.nii.gz, NAME_0001.nii.gz (a file a channel). Each scan goes through the
network as a whole; its labels are written on its own grid, with the values of the training's label files."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="PATH",
        help="a run's folder (its best network is taken, else its final one) or a .safetensors file of it",
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
    parser.add_argument("--overwrite", action="store_true", help="replace label files that exist")


def run(args: argparse.Namespace) -> int:
    from effseg.device import find_device, keep_freed_memory
    from effseg.inference import load_predictor, predict_files

    keep_freed_memory()
    device = find_device(args.device)
    predictor = load_predictor(
        args.checkpoint,
        device,
        bf16=args.dtype == "bf16" or (args.dtype == "auto" and device.type == "cuda"),
        largest_component=args.largest_component,
    )
    predict_files(predictor, args.input, args.output, overwrite=args.overwrite, on_case=_tell)
    return 0


def _tell(path: Path, scan: "Scan", seconds: float) -> None:
    size = "x".join(map(str, scan.grid.shape))
    print(f"{path}: {size} voxels in {seconds:.1f} s", flush=True)
