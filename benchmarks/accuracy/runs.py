"""One run: a contender trained by a budget with a seed on a fold, and its scores, in one JSON file."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.accuracy.contenders import Contender
from benchmarks.accuracy.studies import SEARCH, Study
from effseg.benchmarking import record, results
from effseg.common.atomic import atomic_path
from effseg.common.device import find_device
from effseg.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from effseg.training import TrainingConfig, TrainingResult

SCHEMA = 1
CHECKPOINTS = 8
"""Of a run: what a kill costs at most is the steps since the last one."""


@dataclass(frozen=True)
class Budget:
    """amount of "steps" on whole volumes (on patches as many as see as many voxels), or of "cpu-seconds": so
    many steps as take so much processor time."""

    kind: str
    amount: float

    def __post_init__(self) -> None:
        whole = self.kind == "cpu-seconds" or float(self.amount).is_integer()
        if self.kind not in ("steps", "cpu-seconds") or not (0 < self.amount < math.inf) or not whole:
            raise InputError(
                f"budget: expected steps or cpu-seconds above 0, got {self.amount:g} {self.kind}"
            )

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.amount:g}"

    def steps(self, study: Study, contender: Contender, seconds_per_step: float | None) -> int:
        """seconds_per_step: the contender's, wanted for "cpu-seconds"."""
        if self.kind == "cpu-seconds":
            assert seconds_per_step is not None
            return max(1, round(self.amount / seconds_per_step))
        if not contender.patches:
            return int(self.amount)
        return max(1, round(self.amount * math.prod(study.size) / math.prod(study.patch_size)))


@dataclass(frozen=True)
class Run:
    """rate_of: the study whose search chose the rate; None in a search."""

    study: Study
    contender: Contender
    budget: Budget
    fold: str
    seed: int
    rate: float
    seconds_per_step: float | None = None
    rate_of: str | None = None

    @property
    def place(self) -> Path:
        """In the folder of results. A search has a run a rate, others one a fold and seed."""
        which = f"rate-{self.rate:g}" if self.fold == SEARCH else f"fold-{self.fold}_seed-{self.seed}"
        budget = f"{SEARCH}-{self.budget.name}" if self.fold == SEARCH else self.budget.name
        return Path(self.study.name) / budget / f"{self.contender.name}_{which}.json"


@dataclass(frozen=True)
class Place:
    """results: of the JSON files. scratch: of runs under way, and prepared volumes."""

    results: Path
    scratch: Path
    device: str = "cpu"
    dtype: str = "bf16"

    @property
    def arithmetic(self) -> dict[str, Any]:
        """What scores are computed in, and of how many threads processor time is, but on a GPU. Which CPU it
        was is no part of it: it changes rounding, and tables tell times by machine."""
        device = find_device(self.device).type
        threads = {"threads": torch.get_num_threads()} if device == "cpu" else {}
        return {"dtype": self.dtype, "device": device} | threads


def carry_out(run: Run, place: Place, console: Console | None = None) -> dict[str, Any]:
    """Train, or go on from a killed run's last checkpoint, score, and write the file; what is in it.

    Scored are the weights of the last step: nothing is chosen by the patients that are scored.
    """
    from effseg.training import train

    config = configuration(run, place)
    begun = config.output.with_name(f"{config.output.name}.begun.json")
    machines = _machines(begun, config.output, place)
    result = train(config, console=console)
    document = _document(run, config, result, machines)
    with atomic_path(place.results / run.place) as temporary:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    shutil.rmtree(config.output)
    begun.unlink(missing_ok=True)
    return document


def _machines(begun: Path, run: Path, place: Place) -> list[str]:
    """Those on which the run in a folder has been, with this one; written to the file `begun`.

    Raises InputError where it began in another arithmetic: training goes on with any number of threads and
    on any device, and the run's file would tell of the last ones alone.
    """
    from effseg.training.checkpoint import Checkpoints

    goes_on = Checkpoints(run / "checkpoints").newest() is not None and begun.exists()
    found = results.parsed(begun) if goes_on else {"machines": []}
    check_same(run, found, place.arithmetic, "go on so, or use another scratch folder")
    name = record.machine()["gpu" if place.arithmetic["device"] == "cuda" else "cpu"]
    machines = list(dict.fromkeys([*found["machines"], str(name)]))
    with atomic_path(begun) as temporary:
        temporary.write_text(json.dumps({"machines": machines} | place.arithmetic) + "\n", encoding="utf-8")
    return machines


def configuration(run: Run, place: Place) -> TrainingConfig:
    from effseg.training import TrainingConfig

    study, contender, fold = run.study, run.contender, run.study.folds[run.fold]
    steps = run.budget.steps(study, contender, run.seconds_per_step)
    size = study.patch_size if contender.patches else study.size
    name = contender.register(size, find_device(place.device))
    cases: dict[str, Any] = {"cases": ",".join(fold.training), "fold": "all"}
    if study.validations and run.fold != SEARCH:
        cases = {"cases": ",".join(fold.training + fold.scored), "validation": ",".join(fold.scored)}
    options: dict[str, Any] = dict(study.options) | (dict(study.patch_options) if contender.patches else {})
    return TrainingConfig(
        data=study.data,
        output=place.scratch / "runs" / run.place.with_suffix(""),
        cache=place.scratch / "cache" / study.name,
        model=name,
        patch_size=study.patch_size if contender.patches else None,
        steps=steps,
        seed=run.seed,
        learning_rate=run.rate,
        validation_interval=max(1, math.ceil(steps / max(1, study.validations))),
        checkpoint_interval=max(1, math.ceil(steps / CHECKPOINTS)),
        device=place.device,
        dtype=place.dtype,  # type: ignore[arg-type]
        workers=1,
        **cases,
        **options,
    )


def scores(
    config: TrainingConfig, weights: Path, cases: tuple[str, ...]
) -> dict[str, dict[str, float | None]]:
    """Dice by patient and organ, on the scans' own grids; None for an organ that neither shows."""
    from effseg.data.cases import look_for_cases
    from effseg.data.nifti import read_image, read_labels
    from effseg.evaluation.metrics import dice_per_class
    from effseg.inference import load_predictor

    predictor = load_predictor(weights, find_device(config.device), bf16=config.dtype == "bf16")
    label_map = predictor.label_map
    known = {case.name: case for case in look_for_cases(config.data, labelled=True).cases}
    found = {}
    for name in cases:
        case = known[name]
        assert case.labels is not None
        scan = read_image(case.images)
        truth = label_map.to_classes(read_labels(case.labels, like=scan))
        classes = label_map.to_classes(predictor(scan))
        dice = dice_per_class(classes, truth, label_map.num_classes, label_map.ignore_index)[1:]
        found[name] = dict(zip(label_map.names[1:], map(_number, dice.tolist()), strict=True))
    return found


def _document(
    run: Run, config: TrainingConfig, result: TrainingResult, machines: Sequence[str]
) -> dict[str, Any]:
    from effseg.models.registry import load

    begun, device = record.begin().to_dict(), find_device(config.device).type
    patients = scores(config, result.final, run.study.folds[run.fold].scored)
    return {
        "schema": SCHEMA,
        "machine": begun["machine"] | {"gpu" if device == "cuda" else "cpu": " then ".join(machines)},
        "versions": begun["versions"],
        "study": run.study.name,
        "title": run.study.title,
        "contender": run.contender.name,
        "budget": {"kind": run.budget.kind, "amount": run.budget.amount},
        "fold": run.fold,
        "seed": run.seed,
        "learning_rate": run.rate,
        "learning_rate_of": run.rate_of,
        "parameters": sum(p.numel() for p in load(result.final).parameters()),
        "steps": config.steps,
        "skipped_steps": result.skipped,
        "patch_size": config.patch_size and list(config.patch_size),
        "dtype": config.dtype,
        "device": device,
        "threads": torch.get_num_threads(),
        "time": "processor time of the process, all its threads, in training steps",
        "processor_seconds": result.processor_seconds,
        "seconds_per_step_in_the_race": run.seconds_per_step,
        "wall_steps_per_second": _number(result.steps_per_second),
        "training_cases": len(run.study.folds[run.fold].training),
        "options": _options(run, config),
        "mean_dice": _number(mean_dice(patients)),
        "patients": patients,
        "losses": [round(loss, 4) if math.isfinite(loss) else None for loss in result.losses],
        "curve": _curve(config.output / "progress.csv"),
    }


def _options(run: Run, config: TrainingConfig) -> dict[str, Any]:
    shown = {*run.study.options, *run.study.patch_options}
    return {k: v for k, v in config.to_dict().items() if k in shown}


def check_done(run: Run, place: Place) -> None:
    """Raises InputError where the file of a run that is done is of another one than would be carried out now:
    of other patients, as by another splits_final.json, another learning rate, arithmetic and so on."""
    path, config = place.results / run.place, configuration(run, place)
    found = read_run(path)
    fold = run.study.folds[run.fold]
    expected = {
        "learning_rate": run.rate,
        "steps": config.steps,
        "seed": run.seed,
        "training_cases": len(fold.training),
        "scored": ", ".join(sorted(fold.scored)),
        "options": _options(run, config),
    }
    scored = {"scored": ", ".join(sorted(found["patients"]))}
    check_same(path, found | scored, expected | place.arithmetic)


def _curve(path: Path) -> list[list[float]]:
    """(step, mean Dice) of the validations on the way."""
    from effseg.training.records import read_rows

    rows = [row for row in read_rows(path) if row["dice_mean"]]
    return [[int(row["step"]), float(row["dice_mean"])] for row in rows]


def mean_dice(patients: Mapping[str, Mapping[str, float | None]]) -> float:
    """Mean over the patients, of whom some organ is known, of the mean over the organs that each has."""
    known = [dice for organs in patients.values() if math.isfinite(dice := patient_dice(organs))]
    return float(np.mean(known)) if known else math.nan


def patient_dice(organs: Mapping[str, float | None]) -> float:
    present = [value for value in organs.values() if value is not None]
    return float(np.mean(present)) if present else math.nan


def _number(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def check_same(
    path: Path, found: Mapping[str, Any], expected: Mapping[str, Any], way: str = "use another output"
) -> None:
    """Raises InputError, which says what to do, where what is kept in a file is of other conditions than are
    asked for now."""
    differing = [name for name, value in expected.items() if found.get(name, value) != value]
    if differing:
        was, now = (
            ", ".join(f"{name.replace('_', ' ')} {one[name]}" for name in differing)
            for one in (found, expected)
        )
        raise InputError(f"{path}: of {was}, expected {now}: {way}")


def read_runs(folder: Path) -> Iterator[dict[str, Any]]:
    """Every run's file under a folder, by name. Raises InputError for a file that is none, and for two of one
    run, such as two machines' results in folders of their own hold: it would count twice, or once of both."""
    seen: dict[tuple[Any, ...], Path] = {}
    for path in sorted(folder.rglob("*_*.json")):
        if path.name.startswith("."):  # left of a kill while it was written
            continue
        run = read_run(path)
        which = [
            run.get(name) for name in ("study", "contender", "fold", "seed", "dtype", "device", "threads")
        ]
        rate = run.get("learning_rate") if run.get("fold") == SEARCH else None
        other = seen.setdefault((*which, str(run.get("budget")), rate), path)
        if other != path:
            raise InputError(f"{path}: the same run as {other}: keep one of them")
        yield run


def read_run(path: Path) -> dict[str, Any]:
    document = results.parsed(path)
    if not isinstance(document, dict) or document.get("schema") != SCHEMA or "patients" not in document:
        raise InputError(f"{path}: expected a run of schema {SCHEMA}")
    return document
