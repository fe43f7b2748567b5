"""What a study of accuracy takes for runs that it has done: files of runs that were not run."""

import json

import pytest
import torch

from benchmarks.accuracy import study
from benchmarks.accuracy.contenders import CONTENDERS
from benchmarks.accuracy.paces import paces
from benchmarks.accuracy.runs import Budget, Place, Run
from benchmarks.accuracy.studies import SEARCH, Fold, Study
from effseg.errors import InputError

BASE = CONTENDERS["effseg-base"]
STEPS, SECONDS = Budget("steps", 200), Budget("cpu-seconds", 80)
PACE = 0.5
SEARCHED, BY_STEPS, BY_TIME = (
    "phantoms/search-steps-60/effseg-base_rate-0.001.json",
    "phantoms/steps-200/effseg-base_fold-0_seed-1.json",
    "phantoms/cpu-seconds-80/effseg-base_fold-0_seed-1.json",
)


@pytest.fixture
def phantoms(tmp_path):
    nobody = Fold((), ())
    return Study(
        "phantoms", "phantoms", tmp_path, (8, 8, 8), (4, 4, 4), {SEARCH: nobody, "0": nobody}, (BASE.name,),
        rates=(1e-3,), more_rates=0, search_steps=60,
    )  # fmt: skip


@pytest.fixture
def results(phantoms, tmp_path, monkeypatch):
    """A folder of all runs and their race, in bf16 on a thread of a CPU."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for budget, fold, steps in (
        (Budget("steps", 60), SEARCH, 60),
        (STEPS, "0", 200),
        (SECONDS, "0", 160),
    ):
        path = tmp_path / Run(phantoms, BASE, budget, fold, 1, 1e-3).place
        path.parent.mkdir(parents=True, exist_ok=True)
        arithmetic = {"dtype": "bf16", "device": "cpu", "threads": 1, "machine": {"cpu": "another"}}
        run = {"schema": 1, "patients": {}, "mean_dice": 0.5, "learning_rate": 1e-3, "steps": steps}
        path.write_text(json.dumps(run | arithmetic))
    race = {"dtype": "bf16", "seconds_per_step": {BASE.name: PACE}, "races": [{"machine": {"threads": 1}}]}
    (tmp_path / "phantoms/paces.json").write_text(json.dumps(race))
    return tmp_path


def go(phantoms, results, dtype="bf16"):
    place = Place(results, results, dtype=dtype)
    return study.go(phantoms, [BASE], [STEPS, SECONDS], ["0"], [1], place, print, lambda: False)


def test_runs_of_the_same_conditions_are_taken_whatever_the_cpu(phantoms, results):
    assert go(phantoms, results)


@pytest.mark.parametrize("which", [SEARCHED, BY_STEPS, BY_TIME])
@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"dtype": "fp32"}, "dtype fp32, expected dtype bf16"),
        ({"device": "cuda"}, "device cuda, expected device cpu"),
        ({"threads": 64}, "threads 64, expected threads 1"),
        ({"learning_rate": 0.5}, r"learning rate 0\.5, expected learning rate 0\.001"),
        ({"seed": 7}, r"seed 7, expected seed \d+"),
        ({"training_cases": 16}, "training cases 16, expected training cases 0"),
        ({"patients": {"b": {}, "a": {}}}, "scored a, b, expected scored "),
        ({"options": {"augment": True}}, r"options {'augment': True}, expected options {}"),
        ({"steps": 3, "dtype": "fp32"}, r"steps 3, dtype fp32, expected steps \d+, dtype bf16"),
    ],
)
def test_a_run_of_other_conditions_is_refused(phantoms, results, which, changed, named):
    path = results / which
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(InputError, match=rf"{path.name}: of {named}: use another output$"):
        go(phantoms, results)


def test_another_arithmetic_is_refused_and_not_answered_with_the_old_runs(phantoms, results, monkeypatch):
    with pytest.raises(InputError, match="of dtype bf16, expected dtype fp32: use another output"):
        go(phantoms, results, "fp32")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(InputError, match="of threads 1, expected threads 2: use another output"):
        go(phantoms, results)


def test_a_race_of_another_arithmetic_is_refused(phantoms, results, monkeypatch):
    """Though all paces are known."""
    assert paces(phantoms, [BASE], Place(results, results)) == {BASE.name: PACE}
    with pytest.raises(
        InputError, match=r"paces\.json: of dtype bf16, expected dtype fp32: use another outp"
    ):
        paces(phantoms, [BASE], Place(results, results, dtype="fp32"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(
        InputError, match=r"paces\.json: of threads 1, expected threads 2: use another output"
    ):
        paces(phantoms, [BASE], Place(results, results))
