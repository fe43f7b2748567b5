"""Pictures of memory: bars of a whole CT, and lines over the volume."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from effseg.benchmarking import results
from effseg.benchmarking.record import Record, Row
from effseg.benchmarking.registry import DTYPES
from effseg.figures.canvas import new_figure
from effseg.figures.labels import Labelled, label_beside, plain_logarithmic

MODES = (
    "unet3d/eager", "nnunet/eager", "nnunet/stream/auto", "stock-effseg-base/eager",
    "effseg-base/raw/auto", "effseg-base/stream/auto", "effseg-base/stream+1/auto",
)  # fmt: skip
"""Contenders of the bars."""
LINES = (
    "unet3d/eager",
    "unet3d/checkpoint",
    "nnunet/eager",
    "nnunet/checkpoint",
    "segresnet/eager",
    *MODES[2:],
)
"""Contenders over the volume."""
WHOLE = "512x512x512, 15 classes"
CLASSES = ", 15 classes"
CARDS = (8, 24, 80)
"""Memory of usual ones, in GB."""
GB = 1e9
BAR_COLOURS = {"bf16": "#1f77b4", "fp32": "#aec7e8"}


# Bars


def modes(records: Collection[Record]) -> Any | None:
    """Predicted bytes per voxel of a whole CT, each mode beside the baselines; None without predictions."""
    names = list(predictions(records, MODES, workload=WHOLE))
    if not names:
        return None
    figure = new_figure(8, 4.6)
    axes = figure.subplots()
    for shift, (dtype, colour) in enumerate(BAR_COLOURS.items()):
        rows = [row for (row,) in predictions(records, names, workload=WHOLE, dtype=dtype).values()]
        places = [names.index(row.contender) + 0.38 * shift for row in rows]
        values = [_bytes_per_voxel(row) for row in rows]
        axes.barh(places, values, height=0.36, color=colour, label=dtype)
        for place, value, row in zip(places, values, rows, strict=True):
            gib = (row.bytes_predicted or 0) / 2**30
            axes.text(value * 1.04, place, f"{value:.0f} B/voxel, {gib:.3g} GiB", va="center", fontsize=8)
    axes.set_yticks([i + 0.19 for i in range(len(names))], [_wrapped(results.label(name)) for name in names])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(30, 30_000)
    axes.set_xlabel(f"predicted peak of a training step, bytes per voxel ({WHOLE})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    return figure


def predictions(
    records: Collection[Record], contenders: Iterable[str], **wanted: str
) -> dict[str, list[Row]]:
    """Predicted training steps with 15 classes by contender, in their order, the smallest volume first."""
    found: dict[str, dict[tuple[str, str], Row]] = {name: {} for name in contenders}
    for _, row in results.rows(records, "memory", task="train", **wanted):
        if row.contender in found and row.bytes_predicted and row.voxels and row.workload.endswith(CLASSES):
            found[row.contender][row.workload, row.dtype] = row
    in_order = {name: sorted(rows.values(), key=lambda row: row.voxels or 0) for name, rows in found.items()}
    return {name: rows for name, rows in in_order.items() if rows}


def _bytes_per_voxel(row: Row) -> float:
    return (row.bytes_predicted or 0) / (row.voxels or 1)


def _wrapped(label: str) -> str:
    """In two lines if it is long."""
    first, _, rest = label.partition(", ")
    return f"{first},\n{rest}" if rest and len(label) > 26 else label


# Lines


def against_volume(records: Collection[Record]) -> Any | None:
    """Lines predicted, points measured, a panel for each dtype; None without predictions."""
    if not predictions(records, LINES):
        return None
    figure = new_figure(8.5, 9.5)
    for axes, dtype in zip(figure.subplots(len(DTYPES), 1), DTYPES, strict=True):
        _draw_volumes(axes, records, dtype)
    told = "lines: predicted by effseg; circles: measured on a CPU; diamonds: measured on a GPU"
    figure.suptitle(told, x=0.02, ha="left", fontsize="medium")
    return figure


def _draw_volumes(axes: Any, records: Collection[Record], dtype: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    lines = predictions(records, LINES, dtype=dtype)
    points = measured(records, LINES, dtype)
    ends: list[Labelled] = []
    volumes: dict[int | None, str] = {}
    for name, rows in lines.items():
        colour, ours = results.colour(name), results.is_ours(name)
        voxels, peaks = zip(*((row.voxels, (row.bytes_predicted or 0) / GB) for row in rows), strict=True)
        style = "--" if name.endswith("/checkpoint") else "-"
        axes.plot(voxels, peaks, style, color=colour, linewidth=2.2 if ours else 1.2)
        ends.append(Labelled(results.label(name), voxels[-1], peaks[-1], colour, ours))
        volumes |= {row.voxels: row.workload for row in rows}
    for row, marker in points:
        volumes[row.voxels] = row.workload
        colour = results.colour(row.contender)
        axes.plot(row.voxels, (row.bytes_allocated or 0) / GB, marker, color=colour, markeredgecolor="black")
    for card in CARDS:
        axes.axhline(card, color="0.5", linewidth=0.8, linestyle=":")
        axes.text(0.01, card, f"{card} GB card", transform=axes.get_yaxis_transform(), va="bottom", size=8)
    plain_logarithmic(axes.yaxis, (1,))
    names = [name.removesuffix(CLASSES) for name in volumes.values()]
    axes.set_xticks(list(volumes), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_xticks([], minor=True)
    axes.set_ylabel("peak of a training step, GB ($10^9$ bytes)")
    axes.set_title(f"{dtype}, 15 classes", loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    label_beside(axes, ends)


def measured(records: Collection[Record], contenders: Iterable[str], dtype: str) -> list[tuple[Row, str]]:
    """Training steps with 15 classes whose allocated bytes were measured, each with its marker."""
    known = set(contenders)
    return [
        (row, "D" if results.is_on_gpu(record) else "o")
        for suite in ("memory", "throughput")
        for record, row in results.rows(records, suite, dtype=dtype, task="train")
        if row.contender in known and row.bytes_allocated and row.voxels and row.workload.endswith(CLASSES)
    ]
