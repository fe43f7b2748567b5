"""The runs of a folder as tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.contenders import CONTENDERS
from benchmarks.accuracy.intervals import DIFFERENCE, mean_over_patients
from benchmarks.accuracy.runs import patient_dice, read_runs
from benchmarks.accuracy.studies import SEARCH
from effseg.benchmarking import results
from effseg.benchmarking.tabulation import Table

FIRST = "effseg-base"
"""Whom the others are compared with."""
COLUMNS = (
    "network", "runs", "steps", "processor seconds a run", "learning rate", "mean Dice (95 %)",
    "seeds, lowest to highest", "EffSegNet base minus it (95 %)",
)  # fmt: skip
Scores = dict[tuple[str, int], dict[str, dict[str, float | None]]]
"""By fold and seed, what each patient's organs scored."""


def tables(folder: Path) -> list[Table]:
    """For every study and budget one of all organs together and one of each, then one of each search.

    Runs of several machines stand in one table, their times apart: scores depend on a machine by its rounding
    alone, and by a budget of time all have as many steps, those of the race.
    """
    searched: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for run in read_runs(folder):
        if run["fold"] == SEARCH:
            searched[run["study"], run["steps"]].append(run)
        else:
            budget = f"{run['budget']['amount']:g} {_UNITS[run['budget']['kind']]}"
            part = (
                "held-out cases" if run["fold"] == "held" else "folds" if run["study"] != "phantoms" else ""
            )
            title = ", ".join(filter(None, (run["title"], part, budget)))
            groups[title, _arithmetic(run)][run["contender"]].append(run)
    found = []
    for (title, arithmetic), by_name in groups.items():
        named = {name: by_name[name] for name in CONTENDERS if name in by_name}
        found += [_all_organs(f"{title}; {arithmetic}", named), _each_organ(f"{title}: Dice by organ", named)]
    return found + [_search(study, steps, runs) for (study, steps), runs in searched.items()]


_UNITS = {"steps": "whole-volume steps each", "cpu-seconds": "seconds of the race's processor time each"}


def _arithmetic(run: Mapping[str, Any]) -> str:
    where = "" if run["device"] == "cuda" else f", {run['threads']} thread" + "s" * (run["threads"] != 1)
    return f"{run['dtype']}{where}"


def machine(run: Mapping[str, Any]) -> str:
    return str(run["machine"]["gpu"] if run["device"] == "cuda" else run["machine"]["cpu"])


def _all_organs(title: str, by_name: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    scored = {name: _scores(runs) for name, runs in by_name.items()}
    machines = sorted({machine(run) for runs in by_name.values() for run in runs})
    rows = []
    for name, runs in by_name.items():
        means = [np.mean([patient_dice(organs) for organs in run.values()]) for run in scored[name].values()]
        steps = sorted({run["steps"] for run in runs})
        rates = sorted({_rate(run) for run in runs})
        rows.append(
            (
                label(name),
                str(len(runs)),
                " to ".join(map(str, dict.fromkeys((steps[0], steps[-1])))),
                _seconds(runs, named=len(machines) > 1),
                ", ".join(rates),
                mean_over_patients(_by_patient(scored[name], scored[name])).text(),
                f"{min(means):.3f} to {max(means):.3f}",
                _difference(scored, name),
            )
        )
    ours = frozenset(i for i, name in enumerate(by_name) if results.is_ours(name))
    return Table(f"{title}, {' and '.join(machines)}", COLUMNS, tuple(rows), ours)


def _seconds(runs: Sequence[Mapping[str, Any]], named: bool) -> str:
    """Mean of the runs of each machine, with its name where the table has several."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        seconds[machine(run)].append(run["processor_seconds"])
    return ", ".join(
        f"{np.mean(found):.0f}" + (f" ({name})" if named else "") for name, found in sorted(seconds.items())
    )


def _rate(run: Mapping[str, Any]) -> str:
    other = run.get("learning_rate_of") not in (None, run["study"])
    return f"{run['learning_rate']:g}" + (f" (of {run['learning_rate_of']})" if other else "")


def _difference(scored: Mapping[str, Scores], name: str) -> str:
    """Of the seeds and folds that both have."""
    common = [key for key in scored.get(FIRST, {}) if key in scored[name]]
    if name == FIRST or not common:
        return "-" if name == FIRST else "not measured"
    ours, theirs = (_by_patient(scored[one], common) for one in (FIRST, name))
    all_are = len(common) == max(len(scored[FIRST]), len(scored[name]))
    few = "" if all_are else f", {len(common)} run" + "s" * (len(common) != 1)
    return mean_over_patients(ours - theirs, DIFFERENCE).text("+") + few


def _scores(runs: Iterable[Mapping[str, Any]]) -> Scores:
    return {(run["fold"], run["seed"]): run["patients"] for run in runs}


def _by_patient(scores: Scores, keys: Iterable[tuple[str, int]]) -> np.ndarray:
    """Of every patient the mean over the seeds of its mean over its organs."""
    values: dict[str, list[float]] = defaultdict(list)
    for key in keys:
        for patient, organs in scores[key].items():
            values[patient].append(patient_dice(organs))
    return np.array([np.mean(values[patient]) for patient in sorted(values)])


def _each_organ(title: str, by_name: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Means over patients and seeds."""
    first = next(iter(by_name.values()))[0]
    organs = list(next(iter(first["patients"].values())))
    rows = []
    for organ in organs:
        cells = []
        for runs in by_name.values():
            values = [p[organ] for run in runs for p in run["patients"].values() if p[organ] is not None]
            cells.append(f"{np.mean(values):.3f}" if values else "in none")
        rows.append((organ, *cells))
    return Table(title, ("organ", *map(label, by_name)), tuple(rows))


def _search(study: str, steps: int, runs: Sequence[Mapping[str, Any]]) -> Table:
    """What each learning rate scored on the patients by whom it was chosen."""
    rates = sorted({run["learning_rate"] for run in runs})
    dice = {(run["contender"], run["learning_rate"]): run["mean_dice"] for run in runs}
    rows = []
    for name in (name for name in CONTENDERS if any(run["contender"] == name for run in runs)):
        known = [dice.get((name, rate)) for rate in rates]
        rows.append((label(name), *("not measured" if d is None else f"{d:.3f}" for d in known)))
    title = f"{study}: mean Dice by learning rate after {steps} steps, on patients not reported"
    return Table(title, ("network", *(f"{rate:g}" for rate in rates)), tuple(rows))


def label(name: str) -> str:
    """As people call it."""
    network = name.removesuffix("-patches")
    return results.label(network) + (", on patches" if network != name else "")


def markdown(folder: Path) -> str:
    return "\n\n".join(f"{table.title}:\n\n{table.markdown()}" for table in tables(folder))
