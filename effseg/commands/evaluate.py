"""effseg evaluate: score segmentations against label files."""

import argparse
import math
from pathlib import Path
from typing import Any

from effseg.errors import InputError

HELP = """Score a folder of segmentations: Dice, normalised surface Dice (NSD) and HD95 per organ and case.
Files are paired by case name (NAME.nii.gz with NAME.nii.gz or NAME_seg.nii.gz). An organ that both files
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
    from effseg.evaluation import evaluate_folders, write_summary

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
    _print_table(summary, Console())
    return 0


def _described(labels: Path) -> Path:
    """The folder with the organs' names: the labels' own, else the one above (nnU-Net's labelsTr)."""
    for folder in (labels, labels.resolve().parent):
        if any((folder / name).is_file() for name in ("dataset.json", "labels.json")):
            return folder
    return labels


def _print_table(summary: dict[str, Any], console: Any) -> None:
    from rich.table import Table

    cases = summary["metric_per_case"]
    table = Table(title="1 case" if len(cases) == 1 else f"means over {len(cases)} cases")
    table.add_column("organ")
    headings = {"Dice": "Dice", "NSD": f"NSD {summary['tolerance_mm']:g} mm", "HD95": "HD95 mm"}
    for heading in (*headings.values(), "cases"):
        table.add_column(heading, justify="right")
    for value, means in summary["mean"].items():  # a case counts where either file has the organ
        present = sum(not math.isnan(case["metrics"][value]["Dice"]) for case in cases)
        table.add_row(summary["names"][value], *_cells(means, headings), str(present))
    table.add_section()
    table.add_row("mean", *_cells(summary["foreground_mean"], headings), "", style="bold")
    console.print(table)


def _cells(means: dict[str, float], names: dict[str, str]) -> list[str]:
    digits = {"HD95": 2}
    return ["-" if math.isnan(means[name]) else f"{means[name]:.{digits.get(name, 3)}f}" for name in names]
