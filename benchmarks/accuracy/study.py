"""`python -m benchmarks.accuracy.study`: networks, budgets, seeds and folds, a run after the other.

Every run is one JSON file, written when it ends; what has its file is not run again, and a run that was
killed goes on from its last checkpoint. So the command may be killed at any time, and given again for days.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.accuracy import report
from benchmarks.accuracy.contenders import CONTENDERS, Contender
from benchmarks.accuracy.paces import paces
from benchmarks.accuracy.runs import Budget, Place, Run, carry_out, check_done, read_run
from benchmarks.accuracy.studies import SEARCH, Study, study
from effseg.benchmarking import results
from effseg.common.arguments import Parser
from effseg.common.atomic import atomic_path
from effseg.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

FOLDER = results.FOLDER / "accuracy"
SCRATCH = results.FOLDER.parents[1] / "runs" / "accuracy"

HELP = """Train networks on equal terms and score each on the same unseen patients. The learning rate of each
is the best of a search on patients, and with a seed, that are not reported. Tables with 95 % intervals
(Student's over patients; of differences bootstrapped ones, too) are printed, and written with --table."""


def go(
    chosen: Study,
    contenders: Sequence[Contender],
    budgets: Sequence[Budget],
    folds: Sequence[str],
    seeds: Sequence[int],
    place: Place,
    say: Callable[[str], None],
    goes_on: Callable[[], bool] = lambda: True,
    console: Console | None = None,
    searched: Study | None = None,
) -> bool:
    """Every run that has no file yet, the first seed of all contenders first; whether all are done.

    searched: the study by whose search learning rates are chosen instead of by this one's, where that would
    take too long. A network has one rate then, on whole volumes and on patches.
    """
    done = partial(_done, place=place, say=say, goes_on=goes_on, console=console)
    rates = {}
    for one in contenders:
        if searched is None:
            best = best_rate(chosen, one, place, done)
        else:
            best = best_rate(searched, replace(one, patches=False), place, done)
        if best is None:
            return False
        rates[one.name] = best
    by_time = any(budget.kind == "cpu-seconds" for budget in budgets)
    seconds = paces(chosen, contenders, place) if by_time else {}
    for budget in budgets:
        for seed in seeds:
            for fold in folds:
                for one in contenders:
                    pace = seconds[one.name] if budget.kind == "cpu-seconds" else None
                    rate_of = (searched or chosen).name
                    run = Run(chosen, one, budget, fold, seed, rates[one.name], pace, rate_of)
                    if not done(run):
                        return False
    return True


def best_rate(chosen: Study, contender: Contender, place: Place, done: Callable[[Run], bool]) -> float | None:
    """The best learning rate of the search, which goes on beyond the study's while the lowest or highest one
    is the best; None where a run is not done."""
    budget = Budget("steps", chosen.search_steps)
    rates, found = sorted(chosen.rates), dict[float, float]()
    while True:
        for rate in rates:
            run = Run(chosen, contender, budget, SEARCH, chosen.search_seed, rate)
            if rate not in found:
                if not done(run):
                    return None
                found[rate] = read_run(place.results / run.place)["mean_dice"] or 0.0
        best = max(rates, key=lambda rate: found[rate])
        if len(rates) >= len(chosen.rates) + chosen.more_rates or rates[0] < best < rates[-1]:
            return best
        rates = [best / 2, *rates] if best == rates[0] else [*rates, 2 * best]


def _done(
    run: Run, place: Place, say: Callable[[str], None], goes_on: Callable[[], bool], console: Console | None
) -> bool:
    """Raises InputError where the run's file is of another run, as `check_done` finds."""
    if (place.results / run.place).exists():
        check_done(run, place)
        return True
    if not goes_on():
        return False
    found = carry_out(run, place, console)
    say(
        f"{run.place}: mean Dice {found['mean_dice'] or 0:.3f} after {found['steps']} steps, "
        f"{found['processor_seconds']:.0f} s of processor time"
    )
    return True


# The command


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.accuracy.study", description=HELP)
    parser.add_argument("study", choices=("phantoms", "openkbp"), help="what is learnt")
    parser.add_argument("--data", type=Path, metavar="DIR", help="openkbp's cases")
    parser.add_argument("--steps", type=int, nargs="*", default=[], help="budgets of equal steps")
    parser.add_argument(
        "--cpu-seconds", type=float, nargs="*", default=[], help="budgets of equal processor time"
    )
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), help="default: the study's")
    parser.add_argument(
        "--rates-of", choices=("phantoms",), help="whose search chooses learning rates (default: the study's)"
    )
    parser.add_argument("--folds", nargs="+", help="default: all but the search's")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="how many (default: 5)")
    parser.add_argument("--minutes", type=float, metavar="N", help="begin no run after so long")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="default: bf16")
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR", help="of the runs' files")
    parser.add_argument("--scratch", type=Path, default=SCRATCH, metavar="DIR", help="of runs under way")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the tables as Markdown, too")
    args = parser.parse_args(argv)
    from rich.console import Console

    from effseg.common.device import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(args.threads)
    console, begun = Console(), time.monotonic()
    place = Place(args.output, args.scratch, args.device, args.dtype)
    try:
        chosen = study(args.study, args.data, args.scratch)
        complete = go(
            chosen,
            [CONTENDERS[name] for name in args.contenders or chosen.contenders],
            [Budget("steps", n) for n in args.steps] + [Budget("cpu-seconds", s) for s in args.cpu_seconds],
            _folds(chosen, args.folds),
            range(1, args.seeds + 1),
            place,
            lambda text: print(text, flush=True),
            lambda: args.minutes is None or time.monotonic() - begun < 60 * args.minutes,
            searched=args.rates_of and study(args.rates_of, None, args.scratch),
        )
        for table in report.tables(args.output):
            console.print(table.rich())
        if args.table is not None:
            with atomic_path(args.table) as temporary:
                temporary.write_text(report.markdown(args.output) + "\n", encoding="utf-8")
    except (InputError, OSError) as error:
        print(f"study: error: {error}", file=sys.stderr)
        return 2
    if not complete:
        print("not all runs are done: give the command again to go on")
    return 0


def _folds(chosen: Study, asked: Sequence[str] | None) -> list[str]:
    known = [name for name in chosen.folds if name != SEARCH]
    for name in asked or ():
        if name not in known:
            raise InputError(f"--folds: expected some of {', '.join(known)}, got {name!r}")
    return list(asked or known)


if __name__ == "__main__":
    sys.exit(main())
