"""The command line's frame: dispatch, errors, exit codes."""

import runpy
import sys
from types import SimpleNamespace

import pytest

from effseg import cli
from effseg.errors import InputError
from effseg.version import __version__


def install(monkeypatch, run):
    """Put a command with one argument in place of `plan`."""
    command = SimpleNamespace(
        HELP="a stand-in", add_arguments=lambda parser: parser.add_argument("--size"), run=run
    )
    monkeypatch.setattr(cli, "_command", lambda name: command)


def test_help_lists_every_command_without_importing_one(capsys):
    for name in cli.COMMANDS:
        sys.modules.pop(f"effseg.commands.{name}", None)
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"\n    {name} " in out
        assert f"effseg.commands.{name}" not in sys.modules


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_listed_command_exists_and_explains_itself(name, capsys):
    assert cli.main([name, "--help"]) == 0
    assert f"usage: effseg {name}" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"effseg {__version__}\n"


def test_exit_code_is_the_commands(monkeypatch):
    install(monkeypatch, lambda args: int(args.size))
    assert cli.main(["plan", "--size", "0"]) == 0
    assert cli.main(["plan", "--size", "1"]) == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("volume: expected three sizes,\n got '12'"), "volume: expected three sizes, got '12'"),
        (
            FileNotFoundError(2, "No such file or directory", "a.nii.gz"),
            "a.nii.gz: No such file or directory",
        ),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, capsys, error, line):
    def run(args):
        raise error

    install(monkeypatch, run)
    assert cli.main(["plan"]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"effseg: error: {line}\n"
    assert captured.out == ""


def test_defects_keep_their_traceback(monkeypatch):
    def run(args):
        raise ValueError("not the user's fault")

    install(monkeypatch, run)
    with pytest.raises(ValueError, match="not the user's fault"):
        cli.main(["plan"])


def test_interrupt(monkeypatch):
    def run(args):
        raise KeyboardInterrupt

    install(monkeypatch, run)
    assert cli.main(["plan"]) == 130


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["plan", "--nonsense"]])
def test_bad_usage_is_one_line_and_exit_code_2(monkeypatch, capsys, argv):
    install(monkeypatch, lambda args: 0)
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("effseg: error: ")
    assert captured.err.count("\n") == 1


def test_exit_code_reaches_the_shell(monkeypatch, capsys):
    """As of `python -m effseg nonsense`."""
    monkeypatch.setattr(sys, "argv", ["effseg", "nonsense"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("effseg", run_name="__main__", alter_sys=True)
    assert stopped.value.code == 2
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err
