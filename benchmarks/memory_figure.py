"""Predicted bytes per voxel of a training step, every memory mode against the baselines.

    python benchmarks/memory_figure.py

writes benchmarks/results/memory_modes.json and memory_modes.png. 1x1x512x512x512, 15 classes, Dice +
cross-entropy, AdamW, batch and weights included.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

from dynamic_network_architectures.architectures.unet import PlainConvUNet
from matplotlib.figure import Figure
from torch import nn

from effseg import EffSegNet, UNet3D, peak_training_memory
from effseg.models.stock import StockEffSegNet

CLASSES, SHAPE = 15, (1, 1, 512, 512, 512)
RESULTS = Path(__file__).parent / "results"


def plain_conv_unet() -> nn.Module:
    """nnU-Net's default network."""
    return PlainConvUNet(
        1, 6, (32, 64, 128, 256, 320, 320), nn.Conv3d, 3, (1, 2, 2, 2, 2, 2), 2, CLASSES, 2, conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "3D U-Net (Cicek 2016)": lambda: UNet3D(1, CLASSES),
    "nnU-Net PlainConvUNet": plain_conv_unet,
    "EffSegNet base, stock torch": lambda: StockEffSegNet(1, CLASSES),
    "EffSegNet base, raw": lambda: EffSegNet(1, CLASSES, memory="raw"),
    "EffSegNet base, stream": lambda: EffSegNet(1, CLASSES, memory="stream"),
    "EffSegNet base, stream,\nlevel 1 recomputed": lambda: EffSegNet(
        1, CLASSES, memory="stream", recompute=1
    ),
}


def main() -> None:
    rows = {}
    for name, make in NETWORKS.items():
        reports = {dtype: peak_training_memory(make, SHAPE, dtype=dtype) for dtype in ("bf16", "fp32")}
        rows[name] = {dtype: report.bytes_per_voxel for dtype, report in reports.items()}
        print(name, rows[name], flush=True)
    (RESULTS / "memory_modes.json").write_text(
        json.dumps({"shape": SHAPE, "bytes_per_voxel": rows}, indent=2) + "\n"
    )
    draw(rows).savefig(RESULTS / "memory_modes.png", dpi=150)


def draw(rows: dict[str, dict[str, float]]) -> Figure:
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for shift, (dtype, colour) in enumerate({"bf16": "#1f77b4", "fp32": "#aec7e8"}.items()):
        values = [row[dtype] for row in rows.values()]
        places = [i + 0.38 * shift for i in range(len(rows))]
        axes.barh(places, values, height=0.36, color=colour, label=dtype)
        for place, value in zip(places, values, strict=True):
            gib = value * 512**3 / 2**30
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
    warnings.simplefilter("ignore")
    main()
