"""What GPUs can do at most, by their makers' data sheets, and the least time that it leaves an operator.

Bandwidth of device memory, and dense tensor products with float32 accumulation (data sheets often print twice
as much, "with sparsity"). NVIDIA's documents, by family:

- A100: "NVIDIA A100 Tensor Core GPU" data sheet, 40 GB and 80 GB;
- H100: "NVIDIA H100 Tensor Core GPU" data sheet, SXM, PCIe (its first edition) and NVL;
- H200: "NVIDIA H200 Tensor Core GPU" data sheet, SXM and NVL;
- B200: "NVIDIA DGX B200" data sheet, an eighth of the system's;
- L4, L40S, A10, RTX A6000: their data sheets;
- RTX 3090, 4090, 5090: the white papers of GA102, of Ada and of RTX Blackwell, appendix.

Clocks under load, and power limits, are often lower than those that these figures assume.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from effseg.benchmarking.record import Row


@dataclass(frozen=True)
class Peaks:
    """bandwidth: of device memory, bytes/s; bf16, tf32: floating-point operations/s, an addition and a
    multiplication counted as two."""

    bandwidth: float
    bf16: float
    tf32: float

    def operations(self, dtype: str) -> float:
        """Operations/s of a step in bf16 or fp32: convolutions of float32 use TF32 unless torch is told
        otherwise (torch.backends.cudnn.allow_tf32)."""
        return {"bf16": self.bf16, "fp32": self.tf32}[dtype]


PEAKS = {
    "A100 80GB PCIe": Peaks(1.935e12, 312e12, 156e12),
    "A100-SXM4-80GB": Peaks(2.039e12, 312e12, 156e12),
    "A100-SXM-80GB": Peaks(2.039e12, 312e12, 156e12),
    "A100": Peaks(1.555e12, 312e12, 156e12),
    "H100 PCIe": Peaks(2.0e12, 756e12, 378e12),
    "H100 NVL": Peaks(3.9e12, 835.5e12, 417.5e12),
    "H100": Peaks(3.35e12, 989.4e12, 494.7e12),
    "H200 NVL": Peaks(4.8e12, 835.5e12, 417.5e12),
    "H200": Peaks(4.8e12, 989.4e12, 494.7e12),
    "B200": Peaks(8.0e12, 2250e12, 1125e12),
    "L40S": Peaks(0.864e12, 362e12, 183e12),
    "L4": Peaks(0.3e12, 121e12, 60e12),
    "A10": Peaks(0.6e12, 125e12, 62.5e12),
    "RTX A6000": Peaks(0.768e12, 154.8e12, 77.4e12),
    "GeForce RTX 3090": Peaks(0.936e12, 71e12, 35.6e12),
    "GeForce RTX 4090": Peaks(1.008e12, 165.2e12, 82.6e12),
    "GeForce RTX 5090": Peaks(1.792e12, 209.5e12, 104.8e12),
}
"""By what the name begins with that torch gives, without "NVIDIA"; the longest of several is meant."""
RELATIVES = {"Ti", "D", "Laptop", "MIG"}
"""Words in the names of other GPUs, and of parts of one."""


def peaks(gpu: str | None) -> Peaks | None:
    """Of the GPU that torch calls so; None for an unknown one, or for none."""
    name = (gpu or "").removeprefix("NVIDIA ")
    known = [start for start in PEAKS if _begins_with(name, start)]
    return None if not known or RELATIVES & set(name.split()) else PEAKS[max(known, key=len)]


def _begins_with(name: str, start: str) -> bool:
    """By whole words: an A100 is no A10."""
    return name.startswith(start) and not name[len(start) :][:1].isalnum()


def floor_seconds(row: Row, machine: Mapping[str, Any]) -> float | None:
    """The least time that an operator can take on the machine of its record: its bytes at the memory's full
    bandwidth, or its arithmetic at the tensor cores' full speed, whichever is longer.

    None where the row counts no bytes, and for a CPU or an unknown GPU.
    """
    limit = peaks(machine["gpu"])
    if limit is None or row.bytes_moved is None:
        return None
    return max(row.bytes_moved / limit.bandwidth, 2 * (row.macs or 0) / limit.operations(row.dtype))
