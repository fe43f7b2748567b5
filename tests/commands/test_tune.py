"""`effseg tune`'s frame: arguments, where it writes, what it prints."""

import pytest
import torch

from effseg import cli
from effseg.errors import InputError
from effseg.kernels import tuned
from effseg.kernels.config import ATEN, Config, Problem
from effseg.kernels.tuned import key
from effseg.tuning import autotune, search
from effseg.tuning.problem_lists import Listed, write
from effseg.tuning.trials import Trial

PROBLEM = Problem("fold", "sm_90", "bf16", 32, 32, (8, 8, 8))
OTHER = Problem("conv3d_fwd", "sm_90", "bf16", 32, 32, (8, 8, 8))


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """What the network's problems were asked with; a machine whose kernels are right and take 2 ms."""
    calls = []

    def problems(*arguments):
        calls.append(arguments)
        return [PROBLEM, OTHER]

    def timer(functions):
        return [[2e-3] * 5 for _ in functions]

    machine = autotune.Machine("NVIDIA Some GPU", "sm_90", torch.device("cpu"), timer)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("effseg.commands.tune.SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(autotune.Machine, "here", lambda: machine)
    monkeypatch.setattr(autotune, "problems", problems)
    set_kernels(monkeypatch, lambda candidate: (torch.ones(3),))
    return calls


def set_kernels(monkeypatch, kernel):
    monkeypatch.setattr(search, "trial", lambda problem, device: Trial(lambda: (torch.ones(3),), kernel))


def test_without_a_gpu_it_says_so_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("effseg: error: tune: needs an NVIDIA GPU")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--minutes", "0"], "--minutes"),
        (["--minutes", "nan"], "--minutes"),
        (["--volume", "512"], "--volume"),
        (["--classes", "1"], "num_classes"),
        (["--op", "conv4d"], "--op"),
        (["--model", "unet3d"], "--model"),
    ],
)
def test_bad_arguments_are_one_line(asked, monkeypatch, capsys, arguments, named):
    def problems(model, volume, dtypes, classes, architecture):
        raise InputError("num_classes: expected 2 or more")

    monkeypatch.setattr(autotune, "problems", problems)
    assert cli.main(["tune", *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("effseg: error: ")
    assert named in last


def test_it_measures_tells_and_goes_on(asked, capsys):
    assert cli.main(["tune", "--volume", "64x48x32", "--dtype", "bf16", "--classes", "3"]) == 0
    assert asked == [("effseg-base", (64, 48, 32), ["bf16"], 3, "sm_90")]
    path = tuned.cache_folder() / "nvidia-some-gpu.json"
    assert set(tuned.parse_tuned(path.read_text())) == {key(PROBLEM), key(OTHER)}
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"{key(PROBLEM)}: 2.000 -> 2.000 ms (spread 0.000)  tile block_w=")
    assert out[-1] == f"2 measured, 0 known already, 0 left for another run: {path}"
    assert cli.main(["tune", "--op", "fold", "--minutes", "1"]) == 0
    assert capsys.readouterr().out == f"0 measured, 1 known already, 0 left for another run: {path}\n"


def test_ship_writes_beside_the_kernels(asked, tmp_path):
    assert cli.main(["tune", "--ship"]) == 0
    assert [p.name for p in (tmp_path / "shipped").iterdir()] == ["nvidia-some-gpu.json"]
    assert not tuned.cache_folder().exists()


def test_what_is_dropped_is_listed_and_nothing_right_is_exit_code_1(asked, capsys, monkeypatch):
    set_kernels(monkeypatch, lambda candidate: (torch.zeros(3),))
    assert cli.main(["tune"]) == 1
    out = capsys.readouterr().out
    assert f"{key(PROBLEM)}: no configuration is right\n" in out
    assert f"dropped: {key(OTHER)}: tap " in out
    path = tuned.cache_folder() / "nvidia-some-gpu.json"
    assert tuned.parse_tuned(path.read_text()) == {key(OTHER): Config(ATEN)}


def test_what_a_file_lists_is_not_listed_again(asked, tmp_path, capsys):
    path, volume = tmp_path / "problems.json", (64, 32, 16)
    write({Listed("effseg-base", volume, "bf16", 15, "sm_90"): [PROBLEM, OTHER]}, path)
    arguments = ["tune", "--volume", "64x32x16", "--problems", str(path)]
    assert cli.main([*arguments, "--dtype", "bf16"]) == 0
    assert asked == []
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 measured, 0 known already, 0 left")
    assert cli.main(arguments) == 0  # fp32, too, which it does not have
    assert len(asked) == 1
    assert cli.main(["tune", "--problems", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_a_lost_problem_is_listed_and_exit_code_1(asked, monkeypatch, capsys):
    def lost(needed, machine, path, **options):
        return autotune.Outcome(autotune.TunedFile(path, machine.gpu), lost={needed[0]: "SIGABRT"})

    monkeypatch.setattr(autotune, "tune_isolated", lost)
    assert cli.main(["tune"]) == 1
    assert capsys.readouterr().out.splitlines()[0] == f"lost: {key(PROBLEM)}: SIGABRT"
