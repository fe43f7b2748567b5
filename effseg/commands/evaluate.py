"""effseg evaluate: score segmentations against label files."""

import argparse
from pathlib import Path

from effseg.errors import InputError

HELP = """Score a folder of segmentations: Dice, normalised surface Dice (NSD) and HD95 per organ and case.
Files are paired by case name (NAME.nii.gz with NAME.nii.gz or NAME_seg.nii.gz), and a label file is never
scored against itself, a link to it or a copy of it. An organ that both files
lack is left out of the means; one that only one of them has scores Dice 0, NSD 0 and the volume's diagonal as
HD95."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--predictions", type=Path, required=True, metavar="DIR", help="folder of segmentations to score"
    )
    parser.add_argument(
        "--labels", type=Path, required=True, metavar="DIR", help="label files, or the folder above labelsTr"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE.json",
        help="written as nnU-Net's summary.json, with NSD and HD95 beside",
    )
    parser.add_argument(
        "--tolerance", type=float, default=3.0, metavar="MM", help="of the surface Dice, in mm (default: 3)"
    )
    parser.add_argument(
        "--dataset",
        type=Path,
        metavar="DIR",
        help="folder of the dataset.json or labels.json that names the organs (default: the labels' folder, "
        "or the one above)",
    )
    parser.add_argument(
        "--label-selection",
        metavar="ORGANS",
        help="what to score: a group of labels.json, GROUP:organ,organ or organ,organ (default: all)",
    )
    parser.add_argument("--cases", help="cases to score, e.g. case017-case020 or 'ct_*' (default: all)")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    from effseg.data.labels import load_label_map
    from effseg.evaluation.folders import describe_pairs, evaluate_folders, summary_table, write_summary

    if args.output.is_dir():
        raise InputError(f"{args.output}: expected the name of a JSON file to write, found a folder")
    if not args.labels.is_dir():
        raise InputError(f"{args.labels}: expected a folder of label files, found none")
    label_map = load_label_map(args.dataset or _described(args.labels), args.label_selection)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn())
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task("scoring", total=None)

        def show(name: str, total: int) -> None:
            progress.update(task, description=name, total=total, advance=1)

        summary = evaluate_folders(
            args.predictions, args.labels, label_map, args.tolerance, cases=args.cases, on_case=show
        )
    write_summary(summary, args.output)
    console = Console()
    for line in describe_pairs(summary):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(summary_table(summary))
    return 0


def _described(labels: Path) -> Path:
    """The folder with the organs' names: the labels' own, else the one above (nnU-Net's labelsTr)."""
    for folder in (labels, labels.resolve().parent):
        if any((folder / name).is_file() for name in ("dataset.json", "labels.json")):
            return folder
    return labels
