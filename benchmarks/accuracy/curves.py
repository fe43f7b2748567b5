"""Learning curves of the runs of a folder, as pictures."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.contenders import CONTENDERS
from benchmarks.accuracy.paces import known_paces
from benchmarks.accuracy.report import arithmetic, label, machine
from benchmarks.accuracy.runs import read_runs
from benchmarks.accuracy.studies import SEARCH
from effseg.benchmarking import results
from effseg.figures.canvas import new_figure
from effseg.figures.labels import Labelled, label_beside

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""By contender."""


def figures(folder: Path) -> Iterator[tuple[str, Any]]:
    """For every study and budget whose runs scored patients on the way, held-out ones apart from those of
    folds, a file's name and its picture; one for each arithmetic, which the name tells where there are
    several."""
    groups: dict[tuple[str, ...], dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for run in read_runs(folder):
        if run["fold"] != SEARCH and len(run["curve"]) > 1:
            budget = f"{run['budget']['kind']}-{run['budget']['amount']:g}"
            part = "held" if run["fold"] == "held" else "folds"
            groups[run["study"], part, budget, arithmetic(run)][run["contender"]].append(run)
    alike = Counter(names[:-1] for names in groups)
    for (*names, how), runs in groups.items():
        if alike[tuple(names)] > 1:
            names.append(how.replace(",", "").replace(" ", "-"))
        race = known_paces(folder / names[0])
        yield f"curves_{'_'.join(names)}.png", curves(", ".join(names), runs, race)


def curves(title: str, runs: Runs, race: Mapping[str, float]) -> Any:
    """Mean Dice on the scored patients against steps, and against the steps' processor time: thin lines are
    runs, thick ones their means.

    race: seconds a step by contender. Runs of several machines, whose own times do not compare, have the
    race's; where one was not raced there is no picture of times.
    """
    named = {name: runs[name] for name in CONTENDERS if name in runs}
    units: dict[str, Callable[[Any], float]] = {"steps": lambda run: 1.0}
    if len({machine(run) for found in named.values() for run in found}) == 1:
        units["processor time of training, minutes"] = _minutes_a_step
    elif named.keys() <= race.keys():
        units["processor time of training, by the race, minutes"] = lambda run: race[run["contender"]] / 60
    figure = new_figure(9.5, 3.8)
    panels = figure.subplots(1, len(units), sharey=True, squeeze=False)[0]
    ends = []
    for number, (name, found) in enumerate(named.items()):
        colour = f"C{number}"
        for axes, unit in zip(panels, units.values(), strict=True):
            drawn = [_line(run, unit(run)) for run in found]
            for x, y in drawn:
                axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.5)
            x, y = _mean(drawn)
            axes.plot(x, y, color=colour, linewidth=2.0)
        text = f"{label(name)}, {y[-1]:.3f}"
        ends.append(Labelled(text, x[-1], y[-1], colour, bold=results.is_ours(name)))
    for axes, unit_name in zip(panels, units, strict=True):
        axes.set_xlabel(unit_name)
    panels[0].set_ylabel("mean Dice, scored patients")
    panels[0].set_title(title, loc="left", fontsize="medium")
    label_beside(panels[-1], ends)
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
