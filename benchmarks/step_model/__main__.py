"""`python -m benchmarks.step_model`: the time of a training step on GPUs, on paper."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from rich.console import Console

from benchmarks.step_model.devices import DEVICES, Assumptions
from effseg.common.arguments import Parser
from effseg.errors import InputError
from effseg.memory.units import parse_volume

PAGE = Path(__file__).parents[1] / "README.md"
VOLUMES = ("256x256x256",)


def main(argv: Sequence[str] | None = None) -> int:
    # Kernels must not be imported as interpreted ones: those cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    from benchmarks.step_model.recording import STEPS

    parser = _parser(list(STEPS))
    args = parser.parse_args(argv)
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


def _answers(args: argparse.Namespace, assumed: Assumptions) -> Iterator["report.Answer"]:
    from benchmarks.step_model.model import modelled
    from benchmarks.step_model.recording import missing, record
    from benchmarks.step_model.report import Answer

    console = Console(stderr=True)
    for name, volume, route, device_name in product(args.step, args.volume, args.route, args.device):
        if reason := missing(name):
            raise InputError(f"{name}: {reason}")
        device = DEVICES[device_name]
        with console.status(f"{name}, {volume}, {route}, {device_name}") as status:
            step = record(name, parse_volume(volume), route, device.architecture, device.multiprocessors)
            found = modelled(step, device, args.cache, assumed, lambda what: status.update(f"compiling {what}"))
        yield Answer(name, volume, route, device_name, found)


def _parser(steps: list[str]) -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m benchmarks.step_model",
        description="""A model of a GPU step, on paper: no GPU has run what it says. Of every launch of a
            training step the largest of bytes / bandwidth, issue clocks / (multiprocessors x clock) and tensor
            clocks, plus gaps between launches. Issue and tensor clocks are those of the machine code that the
            package's kernels are compiled to, times the turns of their loops; ATen's operators move every
            tensor once, and products reach an assumed share of the tensor rate. The first run compiles some
            hundred kernels, which takes minutes.""",
    )
    parser.add_argument("--step", nargs="+", choices=steps, default=steps[:3], metavar="STEP",
                        help=f"{', '.join(steps)} (default: the first three)")  # fmt: skip
    parser.add_argument("--volume", nargs="+", default=list(VOLUMES), metavar="DxHxW", help="default: %(default)s")
    parser.add_argument("--route", nargs="+", choices=ROUTES, default=list(ROUTES), metavar="ROUTE",
                        help="; ".join(f"{name}: {what}" for name, what in ROUTES.items()))  # fmt: skip
    parser.add_argument("--device", nargs="+", choices=list(DEVICES), default=list(DEVICES), metavar="DEVICE",
                        help=", ".join(DEVICES))  # fmt: skip
    parser.add_argument("--top", type=int, default=3, metavar="N", help="kernels to name (default: %(default)s)")
    assumed = Assumptions()
    parser.add_argument("--gap", type=float, default=assumed.gap * 1e6, metavar="US",
                        help="assumed between two launches (default: %(default)g)")  # fmt: skip
    parser.add_argument("--host", type=float, default=assumed.host * 1e6, metavar="US",
                        help="assumed of the host for an operator that launches (default: %(default)g)")  # fmt: skip
    parser.add_argument("--library-share", type=float, default=assumed.library_share, metavar="SHARE",
                        help="assumed part of the tensor rate that cuDNN reaches (default: %(default)g)")  # fmt: skip
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "effseg-step-model", metavar="FOLDER",
                        help="keeps what was compiled (default: %(default)s)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the answers there")
    parser.add_argument("--page", type=Path, nargs="?", const=PAGE, metavar="README.md",
                        help="also write the section of a page (without a name: benchmarks/README.md)")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
