"""What a prediction of memory says."""

from dataclasses import asdict, dataclass
from typing import Any

from effseg.memory.units import format_bytes

KINDS = {
    "saved": "kept from the forward pass for backward",
    "gradients": "gradients on their way, and those of the parameters",
    "parameters": "parameters and buffers",
    "optimizer": "the optimizer's state",
    "batch": "image and labels",
    "transient": "what an operator needs while it runs",
}

OUTSIDE = (
    "Counted are tensors. Outside the figure: convolution workspace of cuDNN or oneDNN, the allocator's "
    "rounding and fragmentation, the CUDA context."
)


@dataclass(frozen=True)
class LiveTensor:
    """A tensor that lives at the peak: bytes, one of KINDS, and what made it when."""

    nbytes: int
    kind: str
    operator: str
    phase: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class MemoryReport:
    """Peak bytes of tensors in one training step (forward, loss, backward, optimizer step).

    split: bytes at the peak by KINDS, their sum is `peak`; after_forward: bytes live once the loss is known;
    operator and phase: where the peak is; largest: the largest tensors at the peak, largest first; voxels:
    N * D * H * W of the image; parameters: how many.
    """

    model: str
    shape: tuple[int, ...]
    dtype: str
    peak: int
    split: dict[str, int]
    after_forward: int
    operator: str
    phase: str
    voxels: int
    parameters: int
    largest: tuple[LiveTensor, ...]

    @property
    def bytes_per_voxel(self) -> float:
        return self.peak / self.voxels

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"bytes_per_voxel": self.bytes_per_voxel}

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        lines = [
            f"{self.model}, {self.parameters / 1e6:.2f} M parameters, one training step on {size} in {self.dtype}: "
            f"{format_bytes(self.peak)}, {self.bytes_per_voxel:.0f} B/voxel",
            f"  peak in {self.phase}, at {self.operator}; {format_bytes(self.after_forward)} after the forward pass",
        ]
        lines += [
            f"  {kind:<10} {format_bytes(self.split[kind]):>11} {self.split[kind] / self.voxels:8.1f} B/voxel  {what}"
            for kind, what in KINDS.items()
        ]
        lines.append("  largest:")
        lines += [
            f"    {format_bytes(tensor.nbytes):>11}  {tensor.kind:<10} {tensor.dtype:<9} "
            f"{'x'.join(map(str, tensor.shape)):<22} {tensor.operator} in {tensor.phase}"
            for tensor in self.largest[:8]
        ]
        return "\n".join([*lines, f"  {OUTSIDE}"])
