"""What GPUs are, as their vendor publishes it, and what the model assumes beside that."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """architecture: what its kernels are compiled for; clock: boost, Hz; bandwidth: of device memory,
    bytes/s; flops_per_clock: of a multiprocessor's tensor cores, dense, bf16 operands with float32 sums;
    cache: L2, bytes; source: where the figures are published."""

    name: str
    architecture: str
    multiprocessors: int
    clock: float
    bandwidth: float
    flops_per_clock: int
    cache: int
    source: str

    @property
    def flops(self) -> float:
        """Dense bf16 rate of all tensor cores, 1/s."""
        return self.multiprocessors * self.clock * self.flops_per_clock


DEVICES = {
    device.name: device
    for device in (
        Device(
            "A100", "sm_80", 108, 1.41e9, 2.039e12, 2048, 40 << 20,
            "NVIDIA A100 Tensor Core GPU Architecture (white paper), A100 80GB SXM data sheet: 312 TFLOP/s",
        ),
        Device(
            "H100", "sm_90", 132, 1.83e9, 3.35e12, 4096, 50 << 20,
            "NVIDIA H100 Tensor Core GPU Architecture (white paper), H100 SXM data sheet: 989 TFLOP/s",
        ),
        Device(
            "H200", "sm_90", 132, 1.83e9, 4.8e12, 4096, 50 << 20,
            "NVIDIA H200 SXM data sheet: 989 TFLOP/s, 4.8 TB/s",
        ),
        Device(
            "RTX 4090", "sm_89", 128, 2.52e9, 1.008e12, 512, 72 << 20,
            "NVIDIA Ada GPU Architecture (white paper), appendix A: 165.2 TFLOP/s with FP32 accumulate",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Assumptions:
    """gap: seconds between a kernel's end and the next one's work; host, host_view: seconds that the host
    takes for an operator that launches a kernel, and for one that does not (the host works ahead, so that a
    step takes the longer of both); library_share: part of the tensor rate that cuDNN's and cuBLAS's products
    reach; library_channels: what those pad channels to."""

    gap: float = 4e-6
    host: float = 8e-6
    host_view: float = 2e-6
    library_share: float = 0.35
    library_channels: int = 32
