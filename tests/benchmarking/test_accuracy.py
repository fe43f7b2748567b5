"""The study of accuracy, on phantoms and steps that are too few to learn anything."""

import dataclasses
import json
import multiprocessing
import shutil
import threading
import time

import numpy as np
import pytest
import torch

from benchmarks.accuracy import paces, report, studies, study
from benchmarks.accuracy.contenders import CONTENDERS, Contender, NNUNet, strides_for
from benchmarks.accuracy.runs import Budget, Place, Run, carry_out, configuration
from benchmarks.accuracy.studies import SEARCH, Fold
from effseg import phantom
from effseg.benchmarking import record
from effseg.benchmarking.networks import plain_conv_unet
from effseg.conversion.convert import restore
from effseg.data.preprocessing import AIR
from effseg.errors import InputError
from effseg.models.registry import build_model, load, register
from effseg.models.unet3d import UNet3D
from effseg.training.checkpoint import Checkpoints
from effseg.training.optimizer import Stepper

TINY = Contender("effseg-tiny")
TWO = Budget("steps", 2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Two phantoms train, one serves the search, two are scored."""
    made = studies.phantoms(tmp_path_factory.mktemp("study"), (20, 16, 12), (2, 1, 2))
    return dataclasses.replace(made, rates=(1e-3, 2e-3), more_rates=0, search_steps=1)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "results", tmp_path / "scratch", dtype="fp32")


# nnU-Net's network


@pytest.mark.parametrize(
    ("size", "strides"),
    [
        ((128, 128, 128), [(1, 1, 1)] + [(2, 2, 2)] * 5),
        ((64, 48, 48), [(1, 1, 1)] + [(2, 2, 2)] * 3 + [(2, 1, 1)]),
        ((512, 7, 8), [(1, 1, 1), (2, 1, 2)] + [(2, 1, 1)] * 4),
        ((4, 4, 4), [(1, 1, 1)]),
    ],
)
def test_axes_are_halved_as_nnunet_plans(size, strides):
    assert strides_for(size) == strides


@pytest.fixture
def nnunet():
    torch.manual_seed(0)
    return NNUNet(1, 3, (16, 12, 8)).eval()


def test_it_computes_what_the_original_does(nnunet):
    nnunet.double()
    image = torch.rand(1, 1, 16, 12, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = restore(nnunet.network)(image)
        torch.testing.assert_close(nnunet(image), expected, rtol=1e-9, atol=1e-9)
    plain = plain_conv_unet(3, (32, 64, 128), strides=[(1, 1, 1), (2, 2, 2), (2, 1, 1)])
    assert {n: p.shape for n, p in nnunet.network.named_parameters()} == {
        n: p.shape for n, p in plain.named_parameters()
    }


def test_other_sizes_are_padded_with_air(nnunet):
    image = torch.rand(1, 1, 15, 11, 7)
    padded = torch.full((1, 1, 16, 12, 8), AIR)
    padded[..., :15, :11, :7] = image
    with torch.no_grad():
        torch.testing.assert_close(nnunet(image), nnunet(padded)[..., :15, :11, :7])
    labels = torch.zeros(1, 15, 11, 7, dtype=torch.uint8)
    nnunet.train().loss(image, labels).backward()
    assert nnunet.network.encoder.stages[0][0].convs[0].conv.weight.grad.abs().sum() > 0


def test_its_file_has_every_tensor_once_and_loads(nnunet, tmp_path):
    register("nnunet-test", lambda channels, classes: nnunet, NNUNet)
    assert build_model("nnunet-test", 1, 3) is nnunet
    keys = list(nnunet.state_dict())
    assert keys == [name for name, _ in nnunet.named_parameters()]
    nnunet.save(tmp_path / "w.safetensors")
    found = load(tmp_path / "w.safetensors")
    assert isinstance(found, NNUNet)
    image = torch.rand(1, 1, 16, 12, 8)
    torch.testing.assert_close(found(image), nnunet(image))
    bad = {key: tensor for key, tensor in nnunet.state_dict().items() if key != keys[0]}
    with pytest.raises(RuntimeError, match="Missing key"):
        nnunet.load_state_dict(bad)


def test_bad_sizes_and_channels_are_refused():
    with pytest.raises(InputError, match="size: expected three lengths"):
        NNUNet(1, 3, (8, 8))
    with pytest.raises(InputError, match="in_channels: expected 1, got 2"):
        NNUNet(2, 3, (8, 8, 8))


def test_networks_of_this_package_cannot_be_replaced():
    with pytest.raises(InputError, match="name: expected none of"):
        register("unet3d", UNet3D, UNet3D)
    other = type("UNet3D", (UNet3D,), {})
    with pytest.raises(InputError, match="kind: expected a class of another name"):
        register("unet3d-other", other, other)


def test_the_unet_is_faster_channels_last_and_the_same():
    name = CONTENDERS["unet3d"].register((16, 16, 16), torch.device("cpu"))
    model = build_model(name, 1, 3)
    assert model.encoder[0][3].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert CONTENDERS["unet3d"].register((16, 16, 16), torch.device("cuda")) == "unet3d"
    plain = UNet3D(1, 3)
    plain.load_state_dict(model.state_dict())
    image = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(image), plain.eval()(image))


# Budgets, folds and runs


def test_patches_see_as_many_voxels(tiny):
    patches = dataclasses.replace(TINY, patches=True)
    half = dataclasses.replace(tiny, patch_size=(10, 16, 12))
    assert Budget("steps", 3).steps(half, TINY, None) == 3
    assert Budget("steps", 3).steps(half, patches, None) == 6
    assert Budget("cpu-seconds", 9).steps(half, patches, 2.0) == 4
    assert [TWO.name, Budget("cpu-seconds", 2.5).name] == ["steps-2", "cpu-seconds-2.5"]


@pytest.mark.parametrize(("kind", "amount"), [("steps", 0), ("steps", 1.5), ("cpu-seconds", -1), ("days", 1)])
def test_bad_budgets_are_refused(kind, amount):
    with pytest.raises(InputError, match=r"^budget: expected steps or cpu-seconds above 0, got"):
        Budget(kind, amount)


def test_openkbps_folds(tmp_path):
    folds = studies.openkbp(tmp_path).folds
    assert folds["held"].scored == ("case017", "case018", "case019", "case020")
    assert sorted(name for n in "01234" for name in folds[n].scored) == sorted(
        (*folds["held"].training, *folds["held"].scored)
    )
    for fold in folds.values():
        assert not set(fold.training) & set(fold.scored)
    assert not {*folds[SEARCH].training, *folds[SEARCH].scored} & set(folds["held"].scored)


@pytest.fixture(scope="module")
def studied(tiny, tmp_path_factory):
    """A run on each of two seeds, after the search; what was said meanwhile."""
    folder, said = tmp_path_factory.mktemp("studied"), []
    where = Place(folder / "results", folder / "scratch", dtype="fp32")
    assert study.go(tiny, [TINY], [TWO], ["0"], [1, 2], where, said.append)
    return folder, said


@pytest.fixture
def found(studied, place):
    """The same, at the test's own place."""
    folder, said = studied
    shutil.copytree(folder, place.results.parent, dirs_exist_ok=True)
    return list(said)


def test_a_study_is_searched_then_run_and_not_run_again(tiny, place, found):
    places = [line.split(":")[0] for line in found]
    assert places == [
        "phantoms/search-steps-1/effseg-tiny_rate-0.001.json",
        "phantoms/search-steps-1/effseg-tiny_rate-0.002.json",
        "phantoms/steps-2/effseg-tiny_fold-0_seed-1.json",
        "phantoms/steps-2/effseg-tiny_fold-0_seed-2.json",
    ]
    written = sorted(p.relative_to(place.results).as_posix() for p in place.results.rglob("*.json"))
    assert written == places
    assert not list((place.scratch / "runs").rglob("*.safetensors"))
    assert study.go(tiny, [TINY], [TWO], ["0"], [1, 2], place, found.append)
    assert len(found) == 4
    assert not study.go(tiny, [TINY], [TWO], ["0"], [3], place, found.append, lambda: False)


def test_a_runs_file_says_what_it_was(tiny, place, found):
    text = (place.results / "phantoms/steps-2/effseg-tiny_fold-0_seed-2.json").read_text()
    run = json.loads(text)
    assert (run["seed"], run["fold"], run["steps"], run["dtype"]) == (2, "0", 2, "fp32")
    assert (run["budget"], run["threads"]) == ({"kind": "steps", "amount": 2}, torch.get_num_threads())
    assert run["learning_rate"] in tiny.rates
    assert run["processor_seconds"] > 0
    assert "processor time" in run["time"]
    assert {"cpu", "threads"} < run["machine"].keys()
    assert run["versions"]["torch"] == torch.__version__
    assert list(run["patients"]) == list(tiny.folds["0"].scored)
    assert all(organs.keys() == set(phantom.NAMES[1:]) for organs in run["patients"].values())
    assert len(run["losses"]) == 2
    assert str(place.results.parent) not in text
    search = json.loads((place.results / "phantoms/search-steps-1/effseg-tiny_rate-0.001.json").read_text())
    assert list(search["patients"]) == list(tiny.folds[SEARCH].scored)


def test_the_best_rate_of_the_search_is_taken(tiny, place, found):
    path = place.results / "phantoms/search-steps-1/effseg-tiny_rate-0.001.json"
    for dice, best in ((2.0, 1e-3), (-1.0, 2e-3)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"mean_dice": dice}))
        assert study.best_rate(tiny, TINY, place, lambda run: True) == best
    assert study.best_rate(tiny, TINY, place, lambda run: False) is None


@pytest.mark.parametrize(
    ("best", "more", "tried"),
    [
        (2e-3, 3, [1e-3, 2e-3, 4e-3]),
        (5e-4, 3, [1e-3, 2e-3, 4e-3, 5e-4, 2.5e-4]),
        (5e-4, 1, [1e-3, 2e-3, 4e-3, 5e-4]),
        (16e-3, 3, [1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3]),
        (1.0, 3, [1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3]),
    ],
)
def test_a_search_goes_on_beyond_its_ends(tiny, tmp_path, best, more, tried):
    ways, wide = (
        Place(tmp_path, tmp_path),
        dataclasses.replace(tiny, rates=(1e-3, 2e-3, 4e-3), more_rates=more),
    )
    seen = []

    def done(run):
        seen.append(run.rate)
        (tmp_path / run.place).parent.mkdir(parents=True, exist_ok=True)
        document = {"schema": 1, "patients": {}, "mean_dice": 1 - abs(np.log(run.rate / best)) / 100}
        (tmp_path / run.place).write_text(json.dumps(document))
        return True

    found = study.best_rate(wide, TINY, ways, done)
    assert seen == pytest.approx(tried)
    assert found == pytest.approx(min(tried, key=lambda rate: abs(np.log(rate / best))))


def test_rates_may_be_those_of_another_study(tiny, place, found):
    """Its search is not run, and patches have the rate of whole volumes."""
    other = dataclasses.replace(tiny, name="other")
    patches = dataclasses.replace(TINY, patches=True)
    said = []
    assert study.go(other, [patches], [TWO], ["0"], [1], place, said.append, searched=tiny)
    assert [line.split(":")[0] for line in said] == ["other/steps-2/effseg-tiny-patches_fold-0_seed-1.json"]
    run, phantoms = (
        json.loads((place.results / name).read_text())
        for name in ("other/steps-2/effseg-tiny-patches_fold-0_seed-1.json",
                     "phantoms/steps-2/effseg-tiny_fold-0_seed-1.json")
    )  # fmt: skip
    assert run["learning_rate"] == phantoms["learning_rate"]
    assert [run["learning_rate_of"], phantoms["learning_rate_of"]] == ["phantoms", "phantoms"]
    assert report._rate(run) == f"{run['learning_rate']:g} (of phantoms)"
    assert report._rate(phantoms) == f"{run['learning_rate']:g}"


def test_validations_on_the_way_make_a_curve(tiny, place, monkeypatch):
    monkeypatch.setattr("effseg.figures.draw_overlay", lambda *args, **options: None)
    monkeypatch.setattr("effseg.figures.draw_curves", lambda *args, **options: None)
    curved = dataclasses.replace(tiny, validations=2)
    run = carry_out(Run(curved, TINY, TWO, "0", 1, 1e-3), place)
    assert [step for step, _ in run["curve"]] == [1, 2]
    assert run["curve"][-1][1] == pytest.approx(
        # of the organs' means here, of the patients' there: equal where all show all organs
        np.mean([v for organs in run["patients"].values() for v in organs.values() if v is not None]),
        abs=1e-2,
    )


class Killed(BaseException):
    """As a signal would, from within a step."""


@pytest.fixture
def ended(tiny, place, monkeypatch):
    """A run of four steps that ended in its third one, on a machine of its own."""
    run, step = Run(tiny, TINY, Budget("steps", 4), "0", 1, 1e-3), Stepper.__call__

    def ends(self, number, *batch):
        if number == 2:
            raise Killed
        return step(self, number, *batch)

    with monkeypatch.context() as patched:
        patched.setattr(Stepper, "__call__", ends)
        patched.setattr(record, "processor", lambda: "Slow CPU")
        with pytest.raises(Killed):
            carry_out(run, place)
    assert not list(place.results.rglob("*.json"))
    return run


def test_an_ended_run_goes_on_and_ends_as_one_that_was_not(ended, place, tmp_path, monkeypatch):
    step, steps = Stepper.__call__, []
    whole = carry_out(ended, dataclasses.replace(place, results=tmp_path / "a", scratch=tmp_path / "b"))
    monkeypatch.setattr(Stepper, "__call__", lambda *given: steps.append(given[1]) or step(*given))
    assert_same(carry_out(ended, place), whole)
    assert steps == [2, 3]
    assert not [path for path in (place.scratch / "runs").rglob("*") if path.is_file()]


def test_a_run_of_two_machines_says_so(ended, place, monkeypatch):
    """Its time is that of neither."""
    for cpu in ("Fast CPU", "Slow CPU"):
        monkeypatch.setattr(record, "processor", lambda cpu=cpu: cpu)
        with monkeypatch.context() as patched:
            patched.setattr(Stepper, "__call__", stopped)
            with pytest.raises(Killed):
                carry_out(ended, place)
    assert carry_out(ended, place)["machine"]["cpu"] == "Slow CPU then Fast CPU"


def stopped(*given):
    raise Killed


def test_a_run_does_not_go_on_with_other_threads(ended, place, monkeypatch):
    """Nor for another output, which has the same scratch: its file would tell of those of its end alone."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    named = (
        r"effseg-tiny_fold-0_seed-1: of threads \d+, expected threads 99: go on so, or use another scratch"
    )
    with pytest.raises(InputError, match=named):
        carry_out(ended, dataclasses.replace(place, results=place.results / "other"))


def assert_same(again, whole):
    """Processor time is that of all parts."""
    same = ("losses", "patients", "mean_dice", "steps")
    assert {name: again[name] for name in same} == {name: whole[name] for name in same}
    assert again["processor_seconds"] > whole["processor_seconds"] / 4


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(tiny, place, tmp_path):
    run = Run(tiny, TINY, Budget("steps", 24), "0", 1, 1e-3)
    whole = carry_out(run, dataclasses.replace(place, results=tmp_path / "whole"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["effseg.training"])
    process = context.Process(target=carry_out, args=(run, place))
    process.start()
    checkpoints = Checkpoints(configuration(run, place).output / "checkpoints")
    until = time.monotonic() + 120
    while checkpoints.newest() is None and process.is_alive() and time.monotonic() < until:
        time.sleep(0.001)
    process.kill()
    process.join()
    begun = int(checkpoints.newest().name.removeprefix("step-"))
    assert 0 < begun < 24, "the run ended before its kill: give it more steps"
    assert not list(place.results.rglob("*.json"))
    assert_same(carry_out(run, place), whole)


# The race


def test_a_budget_of_time_becomes_steps_by_a_race(tiny, place, monkeypatch, found):
    monkeypatch.setattr(paces, "ROUNDS", 2)
    monkeypatch.setattr(paces, "WARM", 1)
    budget = Budget("cpu-seconds", 0.5)
    assert study.go(tiny, [TINY], [budget], ["0"], [1], place, found.append)
    kept = json.loads((place.results / "phantoms/paces.json").read_text())
    pace = kept["seconds_per_step"]["effseg-tiny"]
    run = json.loads((place.results / "phantoms/cpu-seconds-0.5/effseg-tiny_fold-0_seed-1.json").read_text())
    assert run["steps"] == max(1, round(0.5 / pace))
    assert run["seconds_per_step_in_the_race"] == pace
    monkeypatch.setattr(paces, "_turn", None)  # it is not raced again
    assert paces.paces(tiny, [TINY], place) == {"effseg-tiny": pace}


@pytest.fixture
def raced(monkeypatch):
    """Seconds a step by contender, told instead of measured."""
    seconds, clock = {"effseg-tiny": 1.0, "unet3d": 8.0, "nnunet": 3.0}, [0.0]

    def turn(study, contender, place):
        def step(number):
            clock[0] += seconds[contender.name]

        return step

    monkeypatch.setattr(paces, "ROUNDS", 3)
    monkeypatch.setattr(paces, "WARM", 1)
    monkeypatch.setattr(paces, "_turn", turn)
    monkeypatch.setattr(paces.time, "process_time", lambda: clock[0])
    return seconds


def test_who_comes_later_is_told_in_seconds_of_the_first_race(tiny, place, monkeypatch, raced):
    """The machine is half as fast by then: a network that takes 3 times the first one's does so still."""
    unet, nnunet = CONTENDERS["unet3d"], CONTENDERS["nnunet"]
    assert paces.paces(tiny, [unet, TINY], place) == {"unet3d": 8.0, "effseg-tiny": 1.0}
    raced.update({name: 2 * pace for name, pace in raced.items()})
    assert paces.paces(tiny, [TINY, nnunet], place) == {"effseg-tiny": 1.0, "nnunet": 3.0}
    kept = json.loads((place.results / "phantoms/paces.json").read_text())
    assert [race["scale"] for race in kept["races"]] == [1.0, 0.5]
    assert kept["races"][1]["of_the_rounds"] == {"effseg-tiny": [2.0, 2.0], "nnunet": [6.0, 6.0]}
    monkeypatch.setattr(paces, "_turn", None)
    assert paces.paces(tiny, [unet], place) == {"unet3d": 8.0}


def test_who_comes_later_does_not_race_on_another_machine(tiny, place, monkeypatch, raced):
    """Which is 8 times as fast for one network and as fast for another one."""
    monkeypatch.setattr(record, "processor", lambda: "Slow CPU")
    assert paces.paces(tiny, [TINY], place) == {"effseg-tiny": 1.0}
    monkeypatch.setattr(record, "processor", lambda: "Fast CPU")
    with pytest.raises(InputError, match=r"paces\.json: of cpu Slow CPU, expected cpu Fast CPU: race there"):
        paces.paces(tiny, [TINY, CONTENDERS["nnunet"]], place)
    assert paces.paces(tiny, [TINY], place) == {"effseg-tiny": 1.0}


def test_two_races_at_once_take_turns(tiny, place, monkeypatch, raced):
    """The second one begins while the first one is under way, and neither's paces are lost."""
    turn, others = paces._turn, []

    def second():
        paces.paces(tiny, [TINY, CONTENDERS["nnunet"]], place)

    def first(*given):
        monkeypatch.setattr(paces, "_turn", turn)
        others.append(threading.Thread(target=second))
        others[0].start()
        others[0].join(0.5)
        return turn(*given)

    monkeypatch.setattr(paces, "_turn", first)
    assert paces.paces(tiny, [TINY], place) == {"effseg-tiny": 1.0}
    others[0].join()
    kept = json.loads((place.results / "phantoms/paces.json").read_text())
    assert kept["seconds_per_step"] == {"effseg-tiny": 1.0, "nnunet": 3.0}
    assert list(kept["races"][1]["of_the_rounds"]) == ["effseg-tiny", "nnunet"]


# The command


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["openkbp"], "--data: expected the folder"),
        (["phantoms", "--data", "."], "--data: expected none for phantoms"),
        (["phantoms", "--folds", "7"], "--folds: expected some of 0, got '7'"),
        (["phantoms", "--steps", "0"], "budget: expected steps"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, capsys, monkeypatch, tiny, arguments, named):
    monkeypatch.setattr(studies, "phantoms", lambda scratch: tiny)
    assert study.main([*arguments, "--scratch", str(tmp_path), "--output", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"study: error: {named}")
    assert err.count("\n") == 1


def test_the_command_prints_and_writes_the_tables(tmp_path, capsys, monkeypatch, tiny):
    monkeypatch.setitem(CONTENDERS, TINY.name, TINY)
    once = dataclasses.replace(tiny, rates=(1e-3,), contenders=(TINY.name,))
    monkeypatch.setattr(studies, "phantoms", lambda scratch: once)
    options = ["--steps", "1", "--seeds", "1", "--dtype", "fp32", "--scratch", str(tmp_path / "scratch")]
    options += ["--output", str(tmp_path / "out"), "--table", str(tmp_path / "table.md")]
    assert study.main(["phantoms", *options]) == 0
    assert "effseg-tiny_fold-0_seed-1.json: mean Dice" in capsys.readouterr().out
    assert "| **EffSegNet tiny** | 1 | 1 |" in (tmp_path / "table.md").read_text()


def test_folds_share_no_patients(tiny):
    assert tiny.folds["0"] == Fold(("phantom_000", "phantom_001"), ("phantom_003", "phantom_004"))
    assert tiny.folds[SEARCH] == Fold(("phantom_000", "phantom_001"), ("phantom_002",))
