"""Scores of a folder of segmentations: nnU-Net's summary.json, with NSD and HD95 beside."""

import json
import math
import os
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effseg.common.atomic import atomic_path
from effseg.data.cases import Case, select_cases
from effseg.data.description import same_text
from effseg.data.identity import header_bytes
from effseg.data.labels import LabelMap
from effseg.data.listing import list_folder, stem
from effseg.data.nifti import read_image, read_labels
from effseg.errors import InputError
from effseg.evaluation.metrics import CONVENTIONS, case_metrics, dice_per_class, mean_metrics

__all__ = [
    "describe_pairs",
    "dice_per_class",
    "evaluate_folders",
    "pair_files",
    "summary_table",
    "write_summary",
]


def pair_files(predictions: Path, labels: Path, cases: str | None = None) -> list[Case]:
    """Pair every label file with the prediction of the same case, in name order.

    Args:
        predictions: folder of ``NAME.nii.gz`` (or ``.nii``, or ``NAME_seg``); of ``NAME.nii.gz`` where it is
            the folder of the labels ``NAME_seg``, too.
        labels: folder of ``NAME_seg.nii.gz``, scans beside them left alone, or of ``NAME.nii.gz``; or the
            folder above a ``labelsTr``.
        cases: which to score, as in `effseg.data.cases.select_cases`; None: all, and then no file of either
            folder may be without its partner.

    Returns: cases whose `images` hold the prediction alone.

    Raises: InputError for a folder that is missing or empty, a case without its partner, or one whose
        prediction is its label file, by whatever name or link.
    """
    labels = labels / "labelsTr" if (labels / "labelsTr").is_dir() else labels
    true = _label_files(labels)
    beside = labels.is_dir() and predictions.is_dir() and labels.samefile(predictions)
    found = _predictions_beside(labels, true) if beside else _label_files(predictions)
    chosen = select_cases([Case(name, (), path) for name, path in true.items()], cases)
    missing = [case.name for case in chosen if case.name not in found]
    if missing:
        raise InputError(f"{predictions}: no prediction for {_listed(missing)} of {labels}")
    unlabelled = [name for name in found if name not in true]
    if unlabelled and cases is None:
        raise InputError(f"{labels}: no labels for the prediction {_listed(unlabelled)} in {predictions}")
    pairs = [Case(case.name, (found[case.name],), case.labels) for case in chosen]
    for pair in pairs:
        assert pair.labels is not None
        if pair.images[0].exists() and pair.labels.exists() and pair.images[0].samefile(pair.labels):
            raise InputError(
                f"{pair.images[0]}: is the label file {pair.labels}, to be scored against itself"
            )
    return pairs


def evaluate_folders(
    predictions: str | os.PathLike[str],
    labels: str | os.PathLike[str],
    label_map: LabelMap,
    tolerance_mm: float = 3.0,
    cases: str | None = None,
    on_case: Callable[[str, int], None] = lambda name, total: None,
) -> dict[str, Any]:
    """Score a folder of segmentations against a folder of label files.

    Args:
        predictions, labels, cases: see `pair_files`.
        label_map: the organs, and their values in the files of both folders. Organs left out of it are
            background; voxels that the labels mark as "ignore" count nowhere.
        tolerance_mm: tolerance of NSD (3 mm: TotalSegmentator, Wasserthal et al. 2023).
        on_case: called with the name and the number of cases before each one.

    Returns: nnU-Net's summary: ``foreground_mean`` {metric: mean over organs}, ``mean`` {value: {metric: mean
        over cases}}, ``metric_per_case`` [{"metrics": {value: {metric: score}}, "prediction_file",
        "reference_file"}], values as strings; beside it ``names`` {value: organ}, ``tolerance_mm`` and
        ``conventions``. NaN of an organ that no case has stays out of ``foreground_mean`` (in nnU-Net's it
        makes the mean NaN).

    Raises: InputError as `pair_files`, and for a file that cannot be read, a grid that differs from the
        label file's, a value that is not in the map.
    """
    if not (math.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise InputError(f"tolerance: expected mm of 0 or more, got {tolerance_mm}")
    pairs = pair_files(Path(predictions), Path(labels), cases)
    values = [str(value) for value in label_map.values]
    per_case: list[dict[str, Any]] = []
    for pair in pairs:
        on_case(pair.name, len(pairs))
        metrics = _score_pair(pair, label_map, tolerance_mm)
        per_case.append(
            {
                "metrics": {values[label]: scores for label, scores in metrics.items()},
                "prediction_file": str(pair.images[0]),
                "reference_file": str(pair.labels),
            }
        )
    means = {value: mean_metrics([case["metrics"][value] for case in per_case]) for value in values[1:]}
    return {
        "foreground_mean": mean_metrics(list(means.values())),
        "mean": means,
        "metric_per_case": per_case,
        "names": dict(zip(values[1:], label_map.names[1:], strict=True)),
        "tolerance_mm": tolerance_mm,
        "conventions": CONVENTIONS,
    }


def write_summary(summary: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a summary as JSON, atomically; NaN as ``NaN``, as nnU-Net and Python's json do."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(summary, indent=4) + "\n", encoding="utf-8")


def describe_pairs(summary: Mapping[str, Any], most: int = 3) -> list[str]:
    """Lines that say which file was scored against which, the first ones."""
    pairs = summary["metric_per_case"]
    lines = [f"{pair['prediction_file']} against {pair['reference_file']}" for pair in pairs[:most]]
    return [*lines, f"... {len(pairs)} pairs"] if len(pairs) > most else lines


def summary_table(summary: Mapping[str, Any]) -> Any:
    """The means of a summary as a rich Table: a row an organ, the last one the mean over organs."""
    from rich.markup import escape
    from rich.table import Table

    cases = summary["metric_per_case"]
    columns = {"Dice": "Dice", "NSD": f"NSD {summary['tolerance_mm']:g} mm", "HD95": "HD95 mm"}
    table = Table(title="1 case" if len(cases) == 1 else f"means over {len(cases)} cases")
    table.add_column("organ")
    for heading in (*columns.values(), "cases"):
        table.add_column(heading, justify="right")
    for value, means in summary["mean"].items():  # a case counts where either of its files has the organ
        present = sum(not math.isnan(case["metrics"][value]["Dice"]) for case in cases)
        scores = (_cell(name, means[name]) for name in columns)
        table.add_row(escape(summary["names"][value]), *scores, str(present))
    table.add_section()
    mean = summary["foreground_mean"]
    table.add_row("mean", *(_cell(name, mean[name]) for name in columns), "", style="bold")
    return table


def _cell(metric: str, score: float) -> str:
    if math.isnan(score):
        return "-"
    return f"{score:.2f}" if metric == "HD95" else f"{score:.3f}"


def _score_pair(pair: Case, label_map: LabelMap, tolerance_mm: float) -> dict[int, dict[str, float | int]]:
    assert pair.labels is not None  # pair_files gives no other
    scan = read_image(pair.labels)
    true, found = read_labels(pair.labels), read_labels(pair.images[0], like=scan)
    _refuse_copy(pair, true, found)
    reference = label_map.to_classes(true, pair.labels)
    prediction = label_map.to_classes(found, pair.images[0])
    ignore = label_map.ignore_index
    if ignore is not None:
        prediction[prediction == ignore] = 0
    return case_metrics(prediction, reference, label_map.num_classes, scan.spacing, tolerance_mm, ignore)


def _refuse_copy(pair: Case, true: np.ndarray, found: np.ndarray) -> None:
    """Raise InputError where the prediction is a copy of the label file: the same voxels under the same
    header, compressed or not. Nothing is known of two files without any organ: they are scored."""
    assert pair.labels is not None
    if not true.any() or not np.array_equal(true, found):
        return
    if header_bytes(pair.labels) == header_bytes(pair.images[0]):
        raise InputError(
            f"{pair.images[0]}: a copy of the label file {pair.labels}, to be scored against itself"
        )


def _predictions_beside(folder: Path, true: Mapping[str, Path]) -> dict[str, Path]:
    """NAME.nii.gz of a folder that holds the labels NAME_seg.nii.gz, too."""
    labels = set(true.values())
    files = [
        path for path in _files(folder) if path not in labels and not stem(path).endswith(("_ct", "_seg"))
    ]
    found = _by_name(folder, files)
    if not found:
        raise InputError(f"{folder}: expected predictions beside the label files, which are not scored alone")
    return {name: path for name, path in found.items() if name in true}


def _label_files(folder: Path) -> dict[str, Path]:
    """Label files by case name; where some are called NAME_seg, their scans are none, nor is any NAME_ct."""
    if not folder.is_dir():
        raise InputError(f"{folder}: {'expected a folder' if folder.exists() else 'no such folder'}")
    files = _files(folder)
    marked = {stem(path).removesuffix("_seg") for path in files if stem(path).endswith("_seg")}
    if marked:
        files = [path for path in files if not _is_scan(stem(path), marked)]
    if not files:
        raise InputError(f"{folder}: expected label files NAME.nii.gz or NAME_seg.nii.gz, found none")
    return _by_name(folder, files)


def _is_scan(name: str, marked: Container[str]) -> bool:
    """Whether a file's name is that of a scan where the labels of the cases `marked` are called NAME_seg."""
    case, _, channel = name.rpartition("_")
    return (
        name in marked
        or name.endswith(("_ct", "_0000"))
        or (case in marked and len(channel) == 4 and channel.isdecimal())
    )


def _files(folder: Path) -> list[Path]:
    """Its NIfTI files; reading one that cannot be opened will say so."""
    listing = list_folder(folder)
    return sorted([*listing.files, *listing.broken])


def _by_name(folder: Path, files: Sequence[Path]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for path in files:
        name = same_text(stem(path).removesuffix("_seg"))
        if name in named:
            raise InputError(f"{folder}: more than one file would be case {name!r}")
        named[name] = path
    return named


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names if len(names) <= 5 else [*names[:4], f"... {len(names)} cases"])
