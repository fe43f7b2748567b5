"""`effseg tune`: measure which kernels and tiles are fastest on this GPU."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from effseg.errors import InputError
from effseg.kernels.config import LOOPS
from effseg.kernels.tuned import SHIPPED, cache_folder
from effseg.memory.units import parse_volume
from effseg.models.registry import MODEL_NAMES

if TYPE_CHECKING:
    from effseg.kernels.config import Problem, Triple
    from effseg.tuning.autotune import Outcome

OWN = tuple(name for name in MODEL_NAMES if name.startswith("effseg-"))
"""Those whose operators are ours."""

HELP = """Measure configurations of our kernels, and ATen's convolutions, for every problem that a training
step and a segmentation on a volume meet, and keep the fastest of those that compute the same as ATen. Needs
an NVIDIA GPU that nothing else uses, takes minutes to hours and may be stopped at any time: the next run goes
on from there. Exit code 1 if a problem had no configuration that is right."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=OWN, default="effseg-base", help="default: %(default)s")
    parser.add_argument("--volume", default="512x512x256", metavar="XxYxZ", help="default: %(default)s")
    parser.add_argument(
        "--dtype", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"], help="default: both"
    )
    parser.add_argument("--classes", type=int, default=15, help="background included (default: 15)")
    parser.add_argument(
        "--minutes", type=float, metavar="N", help="begin no problem after so long (default: no limit)"
    )
    parser.add_argument(
        "--op", nargs="+", choices=LOOPS, default=(), metavar="OP", help=f"only these of {', '.join(LOOPS)}"
    )
    parser.add_argument(
        "--problems", type=Path, metavar="FILE", help="what a step needs, as `benchmarks/problems.json`"
    )
    parser.add_argument("--again", action="store_true", help="also measure what this version has measured")
    parser.add_argument(
        "--ship",
        action="store_true",
        help=f"write beside the package's kernels, not to {cache_folder()}",
    )


def run(args: argparse.Namespace) -> int:
    volume = parse_volume(args.volume)
    if args.minutes is not None and not args.minutes > 0:
        raise InputError(f"--minutes: expected more than 0, got {args.minutes:g}")
    from effseg.tuning import autotune

    machine = autotune.Machine.here()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("listing what a step needs", total=None)
        needed = _needed(args, volume, machine.architecture)
        bar.update(task, total=sum(not args.op or problem.op in args.op for problem in needed))
        outcome = autotune.tune_isolated(
            needed,
            machine,
            (SHIPPED if args.ship else cache_folder()) / f"{machine.slug}.json",
            ops=args.op,
            again=args.again,
            seconds=math.inf if args.minutes is None else 60 * args.minutes,
            show=lambda problem: bar.update(task, advance=1, description=problem.op),
        )
    print(_text(outcome))
    return 1 if outcome.lost or any(not found.measured for found in outcome.searches.values()) else 0


def _needed(args: argparse.Namespace, volume: Triple, architecture: str) -> list[Problem]:
    """From the file where that has it."""
    from effseg.tuning import autotune
    from effseg.tuning.problem_lists import Listed, asked, read

    known = read(args.problems) if args.problems else {}
    found: list[Problem] = []
    for dtype in args.dtype:
        listed = asked(known, Listed(args.model, volume, dtype, args.classes, architecture))
        if listed is None:
            return autotune.problems(args.model, volume, args.dtype, args.classes, architecture)
        found += listed
    return found


def _text(outcome: Outcome) -> str:
    """A line for every problem measured, one for every configuration dropped, and the sum of it."""
    from effseg.kernels.heuristics import heuristic
    from effseg.kernels.tuned import key
    from effseg.tuning.autotune import label

    file, lines = outcome.file, []
    for problem, found in outcome.searches.items():
        name = key(problem)
        if not found.measured:
            lines.append(f"{name}: no configuration is right")
            continue
        chosen = file.entries[name]
        before, now = found.measured.get(heuristic(problem)), found.measured.get(chosen)
        times = [f"{m.median * 1e3:.3f}" if m else "-" for m in (before, now)]
        spread = f" (spread {now.spread * 1e3:.3f})" if now else ""
        lines.append(f"{name}: {times[0]} -> {times[1]} ms{spread}  {label(chosen)}")
    for problem, found in outcome.searches.items():
        lines += [f"dropped: {key(problem)}: {label(c)}: {reason}" for c, reason in found.dropped.items()]
    lines += [f"lost: {key(problem)}: {reason}" for problem, reason in outcome.lost.items()]
    measured = sum(bool(found.measured) for found in outcome.searches.values())
    counts = f"{measured} measured, {outcome.known} known already, {outcome.left} left for another run"
    lines.append(f"{counts}: {file.path}")
    return "\n".join(lines)
