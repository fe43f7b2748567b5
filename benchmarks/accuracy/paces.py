"""What a training step of every contender takes, by a race in which they take turns.

By it a budget of processor time becomes a number of steps, which a learning rate's schedule must know
beforehand, and which is then the same for all seeds. Processor time hardly depends on who else computes, but
cores that share their units and caches do: taking turns, all contenders are slowed down alike.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.accuracy.contenders import CONTENDERS, Contender
from benchmarks.accuracy.runs import Budget, Place, Run, check_same, configuration
from benchmarks.accuracy.studies import SEARCH, Study
from effseg.benchmarking import record, results
from effseg.common.atomic import atomic_path
from effseg.models.registry import build_model

ROUNDS, WARM = 9, 2
"""Steps of each contender, and how many of them do not count."""
FILE = "paces.json"


def paces(study: Study, contenders: Sequence[Contender], place: Place) -> dict[str, float]:
    """Seconds of processor time a step, by contender: the median over the rounds.

    Kept in the study's results. Who is missing there races the quickest one that is known, and its pace is
    told in that one's seconds of the first race: runs are there that were as long as those say. Races of
    several processes take turns, so that none writes over what another one found. Raises InputError where
    they were raced in another arithmetic, or somebody is missing and this is another machine than that of the
    first race: what is twice as fast there for one network need not be so for another.
    """
    path = place.results / study.name / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.parent):
        return _kept_or_raced(path, study, contenders, place)


def _kept_or_raced(
    path: Path, study: Study, contenders: Sequence[Contender], place: Place
) -> dict[str, float]:
    kept: dict[str, Any] = results.parsed(path) if path.exists() else {}
    machine = kept["races"][0]["machine"] if kept else {}  # which says how many threads there were
    check_same(path, machine | kept, place.arithmetic)
    known = known_paces(path.parent)
    missing = [contender for contender in contenders if contender.name not in known]
    if not missing:
        return {contender.name: known[contender.name] for contender in contenders}
    if kept:
        which = "gpu" if place.arithmetic["device"] == "cuda" else "cpu"
        check_same(
            path, machine, {which: record.machine()[which]}, "race there, or all anew for another output"
        )
    named = {contender.name: contender for contender in (*CONTENDERS.values(), *contenders)}
    quickest = min(set(known) & set(named), key=lambda name: known[name], default=None)
    racing = missing if quickest is None else [named[quickest], *missing]
    turns = {contender.name: _turn(study, contender, place) for contender in racing}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(ROUNDS):
        for name, turn in turns.items():
            begun = time.process_time()
            turn(number)
            seconds[name].append(time.process_time() - begun)
    found = {name: float(np.median(times[WARM:])) for name, times in seconds.items()}
    scale = 1.0 if quickest is None else known[quickest] / found[quickest]
    scaled = {name: scale * pace for name, pace in found.items()} | known
    conditions = record.begin().to_dict()
    document = {
        "dtype": place.dtype,
        "device": place.arithmetic["device"],
        "rounds": ROUNDS - WARM,
        "seconds_per_step": scaled,
        "races": [
            *kept.get("races", []),
            {
                "machine": conditions["machine"],
                "versions": conditions["versions"],
                "scale": scale,
                "of_the_rounds": {name: times[WARM:] for name, times in seconds.items()},
            },
        ],
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return {contender.name: scaled[contender.name] for contender in contenders}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; on a file system without locks, all at once."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def known_paces(folder: Path) -> dict[str, float]:
    """Those that are kept in a study's results, and none where no race was run."""
    path = folder / FILE
    return results.parsed(path)["seconds_per_step"] if path.exists() else {}


def _turn(study: Study, contender: Contender, place: Place) -> Callable[[int], None]:
    """A training step as `effseg.training` makes it: the batch, too."""
    from effseg.training.batches import Batches, margin_of
    from effseg.training.data import load_training_data
    from effseg.training.distributed import join_world
    from effseg.training.optimizer import Stepper
    from effseg.training.sampling import Sampler
    from effseg.training.state import RunState

    run = Run(study, contender, Budget("steps", ROUNDS), SEARCH, study.search_seed, min(study.rates))
    config = configuration(run, place)
    with join_world(config.device) as world:
        data = load_training_data(config, world, lambda text: None)
        model = build_model(config.model, data.channels, data.label_map.num_classes).to(world.device)
        options = {"class_weights": data.class_weights.to(world.device), "ignore_index": data.ignore}
        stepper = Stepper(model, config, config.steps, world, options)
        device = world.device
    batches = Batches(
        data.training,
        Sampler(len(data.training), config.seed),
        data.preprocessing.normalise,
        data.augment,
        config.patch_size,
        augment_on=device if config.augments_on(device) else None,
        patch_margin=margin_of(config.augment_strength),
    )
    return partial(_step, stepper, batches, device, RunState())


def _step(stepper: Any, batches: Any, device: torch.device, state: Any, number: int) -> None:
    image, labels = batches(number)
    stepper(number, image.to(device), labels.to(device), state)
