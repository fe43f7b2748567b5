"""Predicted bytes per voxel of a training step, every memory mode against the baselines.

    python benchmarks/memory_figure.py

writes benchmarks/results/memory_modes.json and memory_modes.png. 1x1x512x512x512, 15 classes, Dice +
cross-entropy, AdamW, batch and weights included.
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

from effseg.atomic import atomic_path
from effseg.benchmarking.memory import predict
from effseg.benchmarking.registry import DTYPES, Case, contenders, workloads

WORKLOAD = workloads()["512x512x512, 15 classes"]
RESULTS = Path(__file__).parent / "results"


CONTENDERS = {
    "3D U-Net (Cicek 2016)": "unet3d/eager",
    "nnU-Net PlainConvUNet": "nnunet/eager",
    "EffSegNet base, stock torch": "stock-effseg-base/eager",
    "EffSegNet base, raw": "effseg-base/raw/auto",
    "EffSegNet base, stream": "effseg-base/stream/auto",
    "EffSegNet base, stream,\nlevel 1 recomputed": "effseg-base/stream+1/auto",
}


def main() -> None:
    rows = {}
    for label, name in CONTENDERS.items():
        case = Case(contenders()[name], WORKLOAD)
        rows[label] = {dtype: predict(case, dtype).bytes_per_voxel for dtype in DTYPES}
        print(label, rows[label], flush=True)
    with atomic_path(RESULTS / "memory_modes.json") as path:
        path.write_text(json.dumps({"shape": WORKLOAD.shape, "bytes_per_voxel": rows}, indent=2) + "\n")
    draw(rows).savefig(RESULTS / "memory_modes.png", dpi=150)


def draw(rows: dict[str, dict[str, float]]) -> Figure:
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for shift, (dtype, colour) in enumerate({"bf16": "#1f77b4", "fp32": "#aec7e8"}.items()):
        values = [row[dtype] for row in rows.values()]
        places = [i + 0.38 * shift for i in range(len(rows))]
        axes.barh(places, values, height=0.36, color=colour, label=dtype)
        for place, value in zip(places, values, strict=True):
            gib = value * WORKLOAD.voxels / 2**30
            axes.text(value * 1.04, place, f"{value:.0f} B/voxel, {gib:.3g} GiB", va="center", fontsize=8)
    axes.set_yticks([i + 0.19 for i in range(len(rows))], list(rows))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(30, 30_000)
    axes.set_xlabel("predicted peak of a training step, bytes per voxel (512x512x512, 15 classes)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    return figure


if __name__ == "__main__":
    main()
