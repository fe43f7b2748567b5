"""The README's table of what `memory="auto"` chooses, as Markdown: ``python benchmarks/auto_table.py``."""

from effseg.benchmarking.registry import Workload
from effseg.errors import InputError
from effseg.memory.choice import Settings, choose
from effseg.memory.units import format_bytes

MODEL, DTYPE = "effseg-base", "bf16"
WORKLOADS = [Workload((512, 512, slices)) for slices in (128, 256, 512, 1024)]
BUDGETS = (8, 12, 16, 24, 80)  # GB


def cell(workload: Workload, budget: int) -> str:
    """The choice, its predicted peak and its arithmetic, or what would fit."""
    try:
        choice = choose(MODEL, 1, workload.classes, workload.shape, DTYPE, budget * 10**9)
    except InputError as error:
        return str(error).rsplit("; ", 1)[1].replace("the largest volume that fits is", "up to")
    return f"{short(choice.settings)}: {format_bytes(choice.peak)}, {choice.arithmetic:.2f}x"


def short(settings: Settings) -> str:
    """As in ``stream + 1``: levels recomputed."""
    levels = f" + {settings.recompute_levels}" if settings.recompute_levels else ""
    return f"{settings.memory}{levels}" + (f", {settings.rows} rows" if settings.rows else "")


def main() -> None:
    sizes = ["x".join(map(str, workload.volume)) for workload in WORKLOADS]
    print(f"| budget | {' | '.join(sizes)} |")
    print(f"|---|{'---|' * len(WORKLOADS)}")
    for budget in BUDGETS:
        print(f"| {budget} GB | {' | '.join(cell(workload, budget) for workload in WORKLOADS)} |", flush=True)


if __name__ == "__main__":
    main()
