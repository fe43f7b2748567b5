"""The runs of a folder as tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.contenders import CONTENDERS
from benchmarks.accuracy.intervals import DIFFERENCE, bootstrapped, mean_over_patients
from benchmarks.accuracy.runs import patient_dice, read_runs
from benchmarks.accuracy.studies import SEARCH
from effseg.benchmarking import results
from effseg.benchmarking.tabulation import Table
from effseg.errors import InputError

FIRST = "effseg-base"
"""Whom the others are compared with."""
COLUMNS = (
    "network", "runs", "steps", "processor seconds a run", "learning rate", "mean Dice (95 %)",
    "seeds, lowest to highest", "EffSegNet base minus it (95 %)", "bootstrapped (95 %)",
)  # fmt: skip
Scores = dict[tuple[str, int], dict[str, dict[str, float | None]]]
"""By fold and seed, what each patient's organs scored."""


def tables(folder: Path) -> list[Table]:
    """For every study and budget one of all organs together and one of each, then one of each search.

    Runs of several machines stand in one table, their times apart: scores depend on a machine by its rounding
    alone, and by a budget of time all have as many steps, those of the race.
    """
    searched: dict[tuple[str, int, str], list[dict[str, Any]]] = defaultdict(list)
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for run in read_runs(folder):
        if run["fold"] == SEARCH:
            searched[run["study"], run["steps"], arithmetic(run)].append(run)
        else:
            budget = f"{run['budget']['amount']:g} {_UNITS[run['budget']['kind']]}"
            part = (
                "held-out cases" if run["fold"] == "held" else "folds" if run["study"] != "phantoms" else ""
            )
            title = ", ".join(filter(None, (run["title"], part, budget)))
            groups[title, arithmetic(run)][run["contender"]].append(run)
    found = []
    for (title, how), by_name in groups.items():
        named = {name: by_name[name] for name in CONTENDERS if name in by_name}
        found += [_all_organs(f"{title}; {how}", named), _each_organ(f"{title}: Dice by organ", named)]
    return found + [_search(*names, runs) for names, runs in searched.items()]


_UNITS = {"steps": "whole-volume steps each", "cpu-seconds": "seconds of the race's processor time each"}


def arithmetic(run: Mapping[str, Any]) -> str:
    where = "" if run["device"] == "cuda" else f", {run['threads']} thread" + "s" * (run["threads"] != 1)
    return f"{run['dtype']}{where}"


def machine(run: Mapping[str, Any]) -> str:
    return str(run["machine"]["gpu"] if run["device"] == "cuda" else run["machine"]["cpu"])


def _all_organs(title: str, by_name: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    scored = {name: _scores(runs) for name, runs in by_name.items()}
    machines = sorted({machine(run) for runs in by_name.values() for run in runs})
    rows = []
    for name, runs in by_name.items():
        patients = _by_patient(scored[name])
        steps = sorted({run["steps"] for run in runs})
        rates = sorted({_rate(run) for run in runs})
        rows.append(
            (
                label(name),
                str(len(runs)),
                " to ".join(map(str, dict.fromkeys((steps[0], steps[-1])))),
                _seconds(runs, named=len(machines) > 1),
                ", ".join(rates),
                mean_over_patients(list(patients.values())).text() + _part(patients, scored),
                _by_seed(scored[name]),
                *_difference(scored, name),
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


def _part(patients: Mapping[str, float], scored: Mapping[str, Scores]) -> str:
    """Said of means over fewer patients than others of the table have: they do not compare."""
    every = {patient for scores in scored.values() for patient in _by_patient(scores)}
    return "" if len(patients) == len(every) else f", {len(patients)} of {len(every)} patients"


def _by_seed(scores: Scores) -> str:
    """Lowest and highest mean over patients, of the seeds that have run the same folds as the one that has
    run most: folds are of other patients each."""
    folds: dict[int, Scores] = defaultdict(dict)
    for (fold, seed), patients in scores.items():
        folds[seed][fold, seed] = patients
    ran = {seed: {fold for fold, _ in of} for seed, of in folds.items()}
    most = max(ran.values(), key=len)
    means = [np.mean(list(_by_patient(of).values())) for seed, of in folds.items() if ran[seed] == most]
    return f"{min(means):.3f} to {max(means):.3f}"


def _difference(scored: Mapping[str, Scores], name: str) -> tuple[str, str]:
    """Of the seeds and folds that both have, with Student's interval and with a paired bootstrap's. Raises
    InputError where these are of other patients."""
    common = [key for key in scored.get(FIRST, {}) if key in scored[name]]
    if name == FIRST or not common:
        return ("-", "-") if name == FIRST else ("not measured", "not measured")
    for fold, seed in common:
        if scored[FIRST][fold, seed].keys() != scored[name][fold, seed].keys():
            raise InputError(f"{FIRST} and {name} have scored other patients: fold {fold}, seed {seed}")
    ours, theirs = (_by_patient({key: scored[one][key] for key in common}) for one in (FIRST, name))
    differences = [ours[patient] - theirs[patient] for patient in ours if patient in theirs]
    all_are = len(common) == max(len(scored[FIRST]), len(scored[name]))
    few = "" if all_are else f", {len(common)} run" + "s" * (len(common) != 1)
    student, percentiles = mean_over_patients(differences, DIFFERENCE), bootstrapped(differences)
    return student.text("+") + few, percentiles.interval("+")


def _scores(runs: Iterable[Mapping[str, Any]]) -> Scores:
    return {(run["fold"], run["seed"]): run["patients"] for run in runs}


def _by_patient(scores: Scores) -> dict[str, float]:
    """Of every patient the mean over the seeds of its mean over its organs; none of who shows no organ."""
    values: dict[str, list[float]] = defaultdict(list)
    for patients in scores.values():
        for patient, organs in patients.items():
            values[patient].append(patient_dice(organs))
    known = {patient: np.array(found)[np.isfinite(found)] for patient, found in sorted(values.items())}
    return {patient: float(found.mean()) for patient, found in known.items() if len(found)}


def _each_organ(title: str, by_name: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Means over patients of means over seeds."""
    first = next(iter(by_name.values()))[0]
    organs = list(next(iter(first["patients"].values())))
    scored = {name: _scores(runs) for name, runs in by_name.items()}
    rows = []
    for organ in organs:
        cells = []
        for scores in scored.values():
            alone = {
                key: {patient: {organ: found[organ]} for patient, found in patients.items()}
                for key, patients in scores.items()
            }
            values = list(_by_patient(alone).values())
            cells.append(f"{np.mean(values):.3f}" if values else "in none")
        rows.append((organ, *cells))
    columns = (label(name) + _part(_by_patient(scores), scored) for name, scores in scored.items())
    return Table(title, ("organ", *columns), tuple(rows))


def _search(study: str, steps: int, how: str, runs: Sequence[Mapping[str, Any]]) -> Table:
    """What each learning rate scored on the patients by whom it was chosen."""
    rates = sorted({run["learning_rate"] for run in runs})
    dice = {(run["contender"], run["learning_rate"]): run["mean_dice"] for run in runs}
    rows = []
    for name in (name for name in CONTENDERS if any(run["contender"] == name for run in runs)):
        known = [dice.get((name, rate)) for rate in rates]
        rows.append((label(name), *("not measured" if d is None else f"{d:.3f}" for d in known)))
    title = f"{study}: mean Dice by learning rate after {steps} steps, on patients not reported; {how}"
    return Table(title, ("network", *(f"{rate:g}" for rate in rates)), tuple(rows))


def label(name: str) -> str:
    """As people call it."""
    network = name.removesuffix("-patches")
    return results.label(network) + (", on patches" if network != name else "")


def markdown(folder: Path) -> str:
    return "\n\n".join(f"{table.title}:\n\n{table.markdown()}" for table in tables(folder))
