"""The doctor: sees sound and unsound installations."""

import json

import pytest
import torch

from effseg import cli, doctor


def states(checks):
    return [check.state for check in checks]


def test_this_installation_is_sound(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"packages", "arithmetic on cpu, float64"} <= {check["name"] for check in found["checks"]}


def test_a_fault_is_shown_and_is_the_exit_code(monkeypatch, capsys):
    bad = {"ok": False, "versions": {"torch": "2.9.0", "triton": None}, "gpus": []}
    bad["checks"] = [{"name": "torch and cuDNN", "state": "fault", "detail": "slow"}]
    monkeypatch.setattr("effseg.commands.doctor.diagnose", lambda: bad)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "fault    torch and cuDNN: slow\n" in out
    assert "triton        -\n" in out


def test_wrong_arithmetic_is_found(monkeypatch):
    def doubled(self, image, labels):
        return 2 * right(self, image, labels)

    right = doctor.EffSegNet.loss
    monkeypatch.setattr(doctor.EffSegNet, "loss", doubled)
    assert states(doctor.check_arithmetic()) == ["fault"]


def test_wrong_gradients_are_found(monkeypatch):
    def scaled(self, image, labels):
        loss = right(self, image, labels)
        return 1.001 * loss - 0.001 * loss.detach()

    right = doctor.EffSegNet.loss
    monkeypatch.setattr(doctor.EffSegNet, "loss", scaled)
    assert states(doctor.check_arithmetic()) == ["fault"]


@pytest.mark.parametrize(
    ("torch_version", "cudnn", "issues"),
    [
        ((2, 13, 0), None, []),
        ((2, 13, 0), (9, 20, 0), []),
        ((2, 11, 0), (9, 19, 0), []),
        ((2, 8, 0), (9, 10, 2), ["163539", "167024"]),
        ((2, 7, 1), (9, 5, 1), []),
        ((2, 9, 0), (9, 10, 2), ["167024", "166643", "166122"]),
        ((2, 9, 0), (9, 15, 1), ["166122"]),
        ((2, 9, 1), (9, 10, 2), ["166643"]),
        ((2, 9, 1), (9, 15, 1), []),
    ],
)
def test_known_bad_pairs(torch_version, cudnn, issues):
    checks = list(doctor.check_known_faults(torch_version, cudnn))
    faults = [check for check in checks if check.state == "fault"]
    assert [check.detail.rstrip(")").rsplit("/", 1)[1] for check in faults] == issues
    assert len(checks) == max(1, len(issues))


def test_a_missing_package_is_a_fault_except_where_it_is_optional(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    (check,) = doctor.check_versions()
    assert (check.state, check.detail) == ("fault", "not installed: no-such-package")
    monkeypatch.setattr(doctor, "OPTIONAL", ("no-such-package",))
    assert states(doctor.check_versions()) == ["ok"]


def test_old_gpus_are_told_to_use_fp32(monkeypatch):
    turing = {"name": "T4", "memory": 16 * 2**30, "capability": "7.5"}
    hopper = {"name": "H200", "memory": 139 * 2**30, "capability": "9.0"}
    monkeypatch.setattr(doctor, "gpus", lambda: [turing, hopper])
    assert states(doctor.check_gpus()) == ["warning", "ok"]


@pytest.mark.parametrize(("number", "version"), [(91002, (9, 10, 2)), (8902, (8, 9, 2)), (90100, (9, 1, 0))])
def test_cudnn_version_numbers(number, version):
    assert doctor.parse_cudnn(number) == version


@pytest.mark.gpu
def test_gpu_arithmetic_is_sound():
    checks = list(doctor.check_arithmetic())
    assert len(checks) >= 4
    assert states(checks) == ["ok"] * len(checks)
