"""Learning curves of the runs of a folder, as pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.contenders import CONTENDERS
from benchmarks.accuracy.report import label
from benchmarks.accuracy.runs import read_runs
from benchmarks.accuracy.studies import SEARCH
from effseg.benchmarking import results
from effseg.figures.canvas import new_figure
from effseg.figures.labels import Labelled, label_beside

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""By contender."""


def figures(folder: Path) -> Iterator[tuple[str, Any]]:
    """For every study and budget whose runs scored patients on the way, held-out ones apart from those of
    folds, a file's name and its picture."""
    groups: dict[tuple[str, ...], dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for run in read_runs(folder):
        if run["fold"] != SEARCH and len(run["curve"]) > 1:
            budget = f"{run['budget']['kind']}-{run['budget']['amount']:g}"
            part = "held" if run["fold"] == "held" else "folds"
            groups[run["study"], part, budget][run["contender"]].append(run)
    for names, runs in groups.items():
        yield f"curves_{'_'.join(names)}.png", curves(", ".join(names), runs)


def curves(title: str, runs: Runs) -> Any:
    """Mean Dice on the scored patients against steps, and against the steps' processor time: thin lines are
    runs, thick ones their means."""
    figure = new_figure(9.5, 3.8)
    by_steps, by_time = figure.subplots(1, 2, sharey=True)
    named = {name: runs[name] for name in CONTENDERS if name in runs}
    ends = []
    for number, (name, found) in enumerate(named.items()):
        colour = f"C{number}"
        for axes, unit in ((by_steps, lambda run: 1.0), (by_time, _minutes_a_step)):
            drawn = [_line(run, unit(run)) for run in found]
            for x, y in drawn:
                axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.5)
            x, y = _mean(drawn)
            axes.plot(x, y, color=colour, linewidth=2.0)
        text = f"{label(name)}, {y[-1]:.3f}"
        ends.append(Labelled(text, x[-1], y[-1], colour, bold=results.is_ours(name)))
    by_steps.set_xlabel("steps")
    by_time.set_xlabel("processor time of training, minutes")
    by_steps.set_ylabel("mean Dice, scored patients")
    by_steps.set_title(title, loc="left", fontsize="medium")
    label_beside(by_time, ends)
    return figure


def _minutes_a_step(run: Mapping[str, Any]) -> float:
    return float(run["processor_seconds"]) / float(run["steps"]) / 60


def _line(run: Mapping[str, Any], unit: float) -> tuple[np.ndarray, np.ndarray]:
    steps, dice = np.array(run["curve"], dtype=float).T
    return steps * unit, dice


def _mean(lines: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Over what all lines reach: runs of one contender score at the same steps, or nearly."""
    count = min(len(x) for x, _ in lines)
    x, y = (np.mean([line[axis][:count] for line in lines], axis=0) for axis in (0, 1))
    return x, y
