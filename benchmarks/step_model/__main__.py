"""`python -m benchmarks.step_model`: the time of a training step on GPUs, on paper."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.status import Status

from benchmarks.step_model.devices import DEVICES, Assumptions
from benchmarks.step_model.steps import ROUTES, STEPS
from effseg.common.arguments import Parser
from effseg.errors import InputError
from effseg.memory.units import parse_volume

if TYPE_CHECKING:
    from benchmarks.step_model.report import Answer

PAGE = Path(__file__).parents[1] / "README.md"
CACHE = Path(tempfile.gettempdir()) / "effseg-step-model"


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    for name in ("gap", "host", "top"):
        if getattr(args, name) < 0:
            parser.error(f"--{name}: expected at least 0, got {getattr(args, name):g}")
    if not 0 < args.library_share <= 1:
        parser.error(f"--library-share: expected more than 0 and at most 1, got {args.library_share:g}")
    # Kernels must not be imported as interpreted ones: those cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        return _run(args)
    except (InputError, OSError) as error:
        print(f"step_model: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    from benchmarks.step_model import report

    assumed = replace(
        Assumptions(), gap=args.gap * 1e-6, host=args.host * 1e-6, library_share=args.library_share
    )
    rows = [answer.row(args.top) for answer in _answers(args, assumed)]
    if args.json:
        report.write_json(args.json, report.document(rows, assumed))
    if args.page:
        report.put_into(args.page, report.markdown(rows, assumed))
    Console(width=None if sys.stdout.isatty() else 200).print(report.table(rows))
    return 0


def _answers(args: argparse.Namespace, assumed: Assumptions) -> Iterator[Answer]:
    from benchmarks.step_model.model import break_even, modelled
    from benchmarks.step_model.recording import contender_of, record
    from benchmarks.step_model.report import Answer
    from effseg.benchmarking.registry import missing

    console = Console(stderr=True)
    for name, volume, device_name in product(args.step, args.volume, args.device):
        device, by_kernels = DEVICES[device_name], None
        for route in (route for route in ROUTES if route in args.route):
            if reason := missing(contender_of(name, route)):
                raise InputError(f"{name}: {reason}")
            with console.status(f"{name}, {volume}, {route}, {device_name}") as status:
                step = record(name, parse_volume(volume), route, device.architecture, device.multiprocessors)
                show = partial(_tell, status)
                found = modelled(step, device, args.cache, assumed, show)
                even = None
                if route == "triton":
                    by_kernels = found.device
                elif by_kernels is not None:
                    even = break_even(step, by_kernels, device, args.cache, assumed)
            yield Answer(name, volume, route, device_name, found, even)


def _tell(status: Status, what: str) -> None:
    status.update(f"compiling {what}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m benchmarks.step_model",
        description="""A model of a GPU step, on paper: no GPU has run what it says. Of every launch of a
            training step the largest of bytes / bandwidth, issue clocks / (multiprocessors x clock) and
            tensor clocks, plus gaps between launches. Issue and tensor clocks are those of the machine code
            that the package's kernels are compiled to, times the turns of their loops; ATen's operators move
            every tensor once, and products reach an assumed part of the tensor rate. The first run compiles
            some hundred kernels, which takes minutes.""",
    )
    steps, assumed = list(STEPS), Assumptions()
    routes = "; ".join(f"{name}: {what}" for name, what in ROUTES.items())

    def choices(option: str, names: list[str], default: list[str], what: str) -> None:
        parser.add_argument(
            option, nargs="+", choices=names, default=default, metavar=option[2:].upper(), help=what
        )

    def number(option: str, unit: str, default: float, what: str) -> None:
        parser.add_argument(
            option, type=float, default=default, metavar=unit, help=f"assumed: {what} (default: %(default)g)"
        )

    choices("--step", steps, steps[:3], f"{', '.join(steps)} (default: the first three)")
    choices("--route", list(ROUTES), list(ROUTES), routes)
    choices("--device", list(DEVICES), list(DEVICES), ", ".join(DEVICES))
    parser.add_argument("--volume", nargs="+", default=["256x256x256"], metavar="DxHxW")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="kernels to name (default: 3)")
    number("--gap", "US", assumed.gap * 1e6, "microseconds between two launches")
    number("--host", "US", assumed.host * 1e6, "the host's, for an operator that launches")
    number("--library-share", "SHARE", assumed.library_share, "part of the tensor rate that cuDNN reaches")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, metavar="FOLDER", help="keeps what was compiled (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the answers there")
    parser.add_argument(
        "--page", type=Path, nargs="?", const=PAGE, metavar="FILE",
        help="also write the section of a page; without a name, of benchmarks/README.md",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
