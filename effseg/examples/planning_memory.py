"""What fits on a card, asked in Python: `python -m effseg.examples.planning_memory`, a minute on
any machine.

Every figure is a prediction: a real training step on fake tensors, and a replay of PyTorch's
caching allocator. No GPU is needed and no volume is allocated.
"""

from __future__ import annotations

import effseg
from effseg.memory import Choice
from effseg.memory.units import format_bytes, parse_bytes
from effseg.planning import choose

PRESET = "base"
CLASSES = 15
SHAPE = (1, 1, 512, 512, 256)  # (N, C, D, H, W) in voxels
MODES: tuple[dict[str, object], ...] = (
    {"memory": "raw"},
    {"memory": "stream"},
    {"memory": "stream", "recompute": 1},
)
BUDGETS = ("8GB", "24GB")  # 24GB is 24e9 bytes, 24GiB 24 * 2**30


def main() -> None:
    print(f"one training step on {'x'.join(map(str, SHAPE[2:]))}, {CLASSES} classes, bf16, AdamW")
    for options in MODES:
        report = predicted(**options)
        print(
            f"  {', '.join(f'{name}={value}' for name, value in options.items()):<28}"
            f"{format_bytes(report.reserved):>10} reserved, {report.bytes_per_voxel:.0f} B/voxel in tensors; "
            f"{report.where}"
        )
    for budget in BUDGETS:
        print(f"  auto, {budget}: {told(budget)}")


def predicted(**options: object) -> effseg.MemoryReport:
    """Of the step with these options of `EffSegNet`; its weights take no memory here either."""

    def build() -> effseg.EffSegNet:
        return effseg.EffSegNet(SHAPE[1], CLASSES, PRESET, **options)  # type: ignore[arg-type]

    return effseg.peak_training_memory(build, SHAPE, dtype="bf16", device="cuda")


def told(budget: str) -> str:
    """What `memory="auto"` takes within the budget, or what would fit."""
    try:
        choice: Choice = choose(f"effseg-{PRESET}", SHAPE[1], CLASSES, SHAPE, "bf16", parse_bytes(budget))
    except effseg.InputError as error:
        return str(error)
    needs = f"{format_bytes(choice.reserved)} reserved"
    return f"{choice.settings}: {needs}, {choice.arithmetic:.2f}x the arithmetic"


if __name__ == "__main__":
    main()
