"""effseg demo: the whole way on phantoms."""

import argparse
from pathlib import Path

HELP = """Make CT-like phantoms whose organs look alike in pairs, train effseg-base on them on the CPU,
segment one that was never seen, and print Dice per organ and the memory against the 3D U-Net. Writes the
phantoms, the run, the label file and a picture."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("effseg-demo"),
        metavar="DIR",
        help="folder for all that it writes (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=6.0,
        help="about the longest that training may take: fewer steps on a slow machine (default: %(default)g)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of phantoms and training (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from effseg.common.device import keep_freed_memory
    from effseg.phantom.demo import run_demo

    keep_freed_memory()
    run_demo(args.output, args.minutes, args.seed, console=Console())
    return 0
