"""Pictures of a machine's times: throughput against memory, and its roofline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from effseg.benchmarking import results
from effseg.benchmarking.peaks import Peaks, peaks
from effseg.benchmarking.record import Record, Row
from effseg.figures.canvas import new_figure
from effseg.figures.labels import Labelled, label_beside, plain_logarithmic

GIB = 2**30
OPERATOR_COLOURS = {"aten": "tab:orange", "triton": "tab:blue", "eager": "tab:brown", "compile": "tab:purple"}


# Throughput against memory


def throughput(record: Record) -> Any | None:
    """A panel for each workload and dtype whose training steps have time and memory; None without any.

    What no other contender beats in both lies on the line.
    """
    groups = steps(record)
    if not groups:
        return None
    figure, panels = _stacked([len(rows) for rows in groups.values()])
    for axes, ((workload, dtype), rows) in zip(panels, groups.items(), strict=True):
        _draw_throughput(axes, rows)
        axes.set_title(f"training step, {workload}, {dtype}", loc="left", fontsize="medium")
    panels[-1].set_xlabel("measured peak memory, GiB (left is better)")
    figure.suptitle(results.machine(record), x=0.02, ha="left", fontsize="medium")
    return figure


def steps(record: Record) -> dict[tuple[str, str], list[Row]]:
    """Training steps whose time and memory were measured, by workload and dtype."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for _, row in results.rows([record], "throughput", task="train"):
        if row.voxels_per_second and row.bytes_allocated:
            groups.setdefault((row.workload, row.dtype), []).append(row)
    return groups


def _stacked(labels: Sequence[int]) -> tuple[Any, Any]:
    """A figure and its panels, one above the other, each with room for so many labels beside it."""
    heights = [max(3.9, 0.9 + 0.17 * count) for count in labels]
    figure = new_figure(8.5, 0.5 + sum(heights))
    return figure, figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]


def _draw_throughput(axes: Any, rows: Sequence[Row]) -> None:
    points = {row.contender: _point(row) for row in rows}
    axes.set_xscale("log")
    axes.set_yscale("log")
    best = pareto(list(points.values()))
    axes.step(*zip(*best, strict=True), where="post", color="0.6", linewidth=1, zorder=1)
    for name, point in points.items():
        axes.plot(*point, "o", color=results.colour(name), markersize=8 if results.is_ours(name) else 6)
    for axis in (axes.xaxis, axes.yaxis):
        plain_logarithmic(axis)
    axes.margins(0.08)
    axes.set_ylabel("million voxels per second")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    labels = [
        Labelled(results.label(name), *point, results.colour(name), results.is_ours(name))
        for name, point in points.items()
    ]
    label_beside(axes, labels)


def _point(row: Row) -> tuple[float, float]:
    """GiB, million voxels per second."""
    return (row.bytes_allocated or 0) / GIB, (row.voxels_per_second or 0) / 1e6


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other has less memory (first) and more speed (second) than, by memory."""
    found: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if not found or point[1] > found[-1][1]:
            found.append(point)
    return found


# Roofline


def roofline(record: Record) -> Any | None:
    """A panel for each dtype of the operators that were timed, under the GPU's two ceilings; None where the
    GPU's are not known."""
    limits, groups = peaks(record.machine["gpu"]), operators(record)
    if limits is None or not groups:
        return None
    figure, panels = _stacked([len(rows) for rows in groups.values()])
    for axes, (dtype, rows) in zip(panels, groups.items(), strict=True):
        _draw_roofline(axes, rows, limits, dtype)
    panels[-1].set_xlabel("arithmetic intensity, FLOP per byte of least device-memory traffic")
    figure.suptitle(results.machine(record), x=0.02, ha="left", fontsize="medium")
    return figure


def operators(record: Record) -> dict[str, list[Row]]:
    """Those that were timed and multiply, by dtype; none where the GPU's ceilings are not known."""
    groups: dict[str, list[Row]] = {}
    for _, row in results.rows([record], "kernels"):
        if row.seconds_p50 and row.bytes_moved and row.macs and peaks(record.machine["gpu"]):
            groups.setdefault(row.dtype, []).append(row)
    return groups


def _draw_roofline(axes: Any, rows: Sequence[Row], limits: Peaks, dtype: str) -> None:
    points = [(row, *_work(row)) for row in rows]
    intensities = [intensity for _, intensity, _ in points]
    ridge = limits.operations(dtype) / limits.bandwidth
    across = np.geomspace(min(*intensities, ridge) / 2, max(*intensities, ridge) * 2, 200)
    ceiling = np.minimum(across * limits.bandwidth, limits.operations(dtype)) / 1e12
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot(across, ceiling, color="black", linewidth=1.5)
    shown = {}
    for row, intensity, achieved in points:
        contender = row.contender.rpartition("/")[2]
        (shown[contender],) = axes.plot(
            intensity, achieved, "o", color=OPERATOR_COLOURS.get(contender, "0.4"), label=contender
        )
    for axis in (axes.xaxis, axes.yaxis):
        plain_logarithmic(axis)
    told = f"{limits.bandwidth / 1e12:.3g} TB/s and {limits.operations(dtype) / 1e12:.4g} TFLOP/s"
    axes.set_title(f"operators, {dtype}; ceilings {told}", loc="left", fontsize="medium")
    axes.set_ylabel("achieved TFLOP/s")
    axes.legend(handles=list(shown.values()), loc="lower right", frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    label_beside(axes, [_operator_label(*point) for point in _fastest(points)])


def _work(row: Row) -> tuple[float, float]:
    """FLOP per byte, 10^12 FLOP per second; a multiply-accumulate is two."""
    flops = 2 * (row.macs or 0)
    return flops / (row.bytes_moved or 1), flops / (row.seconds_p50 or 1) / 1e12


def _fastest(points: Sequence[tuple[Row, float, float]]) -> list[tuple[Row, float, float]]:
    """Of each operator and size the contender that achieves most."""
    found: dict[tuple[str, str], tuple[Row, float, float]] = {}
    for row, intensity, achieved in points:
        key = row.contender.rpartition("/")[0], row.workload
        if key not in found or achieved > found[key][2]:
            found[key] = row, intensity, achieved
    return list(found.values())


def _operator_label(row: Row, intensity: float, achieved: float) -> Labelled:
    operator, _, contender = row.contender.rpartition("/")
    return Labelled(operator, intensity, achieved, OPERATOR_COLOURS.get(contender, "0.4"))
