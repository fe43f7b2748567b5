"""`python -m benchmarks.problems`: lists what kernels are asked for by what `benchmarks/gpu.sh` checks and
tunes and `effseg bench` measures, on any machine in some minutes, and writes benchmarks/problems.json."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from benchmarks.real_size import VOLUMES
from effseg.common.arguments import Parser
from effseg.kernels.config import Problem
from effseg.memory.units import parse_volume
from effseg.tuning import autotune
from effseg.tuning.problem_lists import Listed, write

FILE = Path(__file__).with_name("problems.json")
MODEL, CLASSES, ARCHITECTURE = "effseg-base", 15, "sm_90"
TUNED = "512x512x256"
"""As `effseg tune` has it by default."""
BENCHED = ("96x96x96", "512x512x128")
"""As the suite of kernels has them."""
SAMPLE = "32x32x16"
"""Listed in seconds: what a test compares, so that the file does not grow old unseen."""


def lists() -> Iterator[Listed]:
    yield Listed(MODEL, parse_volume(SAMPLE), "bf16", CLASSES, ARCHITECTURE)
    for dtype, volume in product(("bf16", "fp32"), (TUNED, *VOLUMES, *BENCHED)):
        yield Listed(MODEL, parse_volume(volume), dtype, CLASSES, ARCHITECTURE)


def problems(listed: Listed) -> list[Problem]:
    model, volume, dtype, classes, architecture = listed
    return autotune.problems(model, volume, [dtype], classes, architecture)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.problems", description=__doc__)
    parser.add_argument("--output", type=Path, default=FILE, metavar="FILE", help="default: %(default)s")
    args = parser.parse_args(argv)
    found = {}
    for listed in lists():
        found[listed] = problems(listed)
        print(f"{listed.volume}, {listed.dtype}: {len(found[listed])} problems", flush=True)
    write(found, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
