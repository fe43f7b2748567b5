"""The command line: finds the command, parses, calls it, and turns errors into one line and an exit code."""

import argparse
import importlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

from effseg.common.arguments import EXIT_BAD_INPUT, Parser
from effseg.errors import InputError, InputWarning, LostProcess
from effseg.version import __version__

# The overview's lines stand here and not in the commands' files, so that `effseg --help` imports none.
COMMANDS = {
    "demo": "train on CT-like phantoms for a few minutes, segment an unseen one, show Dice and memory",
    "train": "train a network on whole CT volumes",
    "predict": "segment CT scans with a trained network, each on its own grid",
    "evaluate": "score segmentations: Dice, surface Dice, HD95 per organ",
    "plan": "say whether a volume fits on a GPU, and how large a volume does",
    "nnunet": "run nnU-Net's planning, training or prediction with this package's trainers",
    "tune": "measure which kernels and tiles are fastest on this GPU",
    "bench": "measure time and memory beside other networks, or compare two such records",
    "doctor": "check versions, the GPU, known faults, and the arithmetic",
}

EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done; 1: the command's own negative answer; 2: bad input or usage, told in one line on stderr;
    130: interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # names of organs and files in a locale that cannot write them
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        args = _parser(arguments).parse_args(arguments)
        with _warnings_as_lines():
            code: int = args.run(args)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse, after --help or a usage error
        return stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:  # the reader of our output left, as in `effseg plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InputError, LostProcess, OSError) as error:
        print(f"effseg: error: {_one_line(error)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("effseg: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = Parser(
        prog="effseg",
        description="3D segmentation of whole CT volumes in a fraction of the memory.",
        epilog="`effseg COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"effseg {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    called = next((word for word in arguments if not word.startswith("-")), None)
    for name, line in COMMANDS.items():
        if name == called:
            module = _command(name)
            command = commands.add_parser(name, help=line, description=module.HELP)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
        else:
            commands.add_parser(name, help=line)
    return parser


def _command(name: str) -> ModuleType:
    return importlib.import_module(f"effseg.commands.{name}")


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Every warning about the input is one line on stderr; other warnings are left as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", InputWarning)
        show = warnings.showwarning

        def line(message, category, filename, lineno, file=None, source=None):  # type: ignore[no-untyped-def]
            if issubclass(category, InputWarning):
                print(f"effseg: warning: {_one_line(message)}", file=sys.stderr, flush=True)
            else:
                show(message, category, filename, lineno, file, source)

        warnings.showwarning = line
        yield


def _one_line(error: Exception | Warning) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
