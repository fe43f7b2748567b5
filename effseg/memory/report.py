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
    "Reserved: what PyTorch's caching allocator takes of a GPU, by its rules with default settings, with a "
    "workspace for each convolution as large as what it reads and writes, 256 MiB at most. Outside the "
    "figure: the CUDA context."
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
    """Peak bytes of one training step (forward, loss, backward, optimizer step).

    peak: of tensors; allocated: of the caching allocator's blocks in use, so with rounding and convolution
    workspace; reserved: of what the allocator holds, free blocks too; reserved_expandable: the same with
    expandable_segments; workspace: the largest that a convolution is taken to need. On a GPU `allocated` is
    to be compared with torch.cuda.max_memory_allocated, `reserved` with max_memory_reserved; it is what must
    fit. For a CPU, which caches nothing, all are `peak`, and the workspace is not reckoned with.

    split: bytes at the peak by KINDS, their sum is `peak`; after_forward: bytes live once the loss is known;
    phase, operator, node: where the peak is, node being the graph's in the backward phase; voxels: N * D * H
    * W of the image; parameters: how many; macs: multiply-accumulates of convolutions and matrix products in
    the step; largest: the largest tensors at the peak, largest first. processes: that share the volume;
    bytes and macs are then one's, which sends `sent` bytes to others in `messages` tensors, besides what
    completes the parameters' gradients. host: bytes of the host's memory, pinned, in which tensors of a GPU
    lie; to_host, to_device: bytes that a step copies there and back.
    """

    model: str
    shape: tuple[int, ...]
    dtype: str
    peak: int
    allocated: int
    reserved: int
    reserved_expandable: int
    workspace: int
    split: dict[str, int]
    after_forward: int
    operator: str
    node: str
    phase: str
    voxels: int
    parameters: int
    macs: int
    largest: tuple[LiveTensor, ...]
    processes: int = 1
    sent: int = 0
    messages: int = 0
    host: int = 0
    to_host: int = 0
    to_device: int = 0

    @property
    def bytes_per_voxel(self) -> float:
        """peak / voxels, of those that a process holds."""
        return self.peak * self.processes / self.voxels

    def to_dict(self) -> dict[str, Any]:
        """The fields, and bytes_per_voxel, as JSON can hold them."""
        return asdict(self) | {"bytes_per_voxel": self.bytes_per_voxel}

    @property
    def where(self) -> str:
        """The place of the peak, for people."""
        return f"peak in {self.phase}, at {self.operator}" + (f" of {self.node}" if self.node else "")

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        after = format_bytes(self.after_forward)
        lines = [
            f"{self.model}, {self.parameters / 1e6:.2f} M parameters, one training step on {size} in "
            f"{self.dtype}: {format_bytes(self.reserved)} reserved, {format_bytes(self.peak)} in tensors, "
            f"{self.bytes_per_voxel:.0f} B/voxel",
            f"  {self.where}; {after} after the forward pass",
            *[f"  {line}" for line in self.host_lines()],
            *self.split_lines("  "),
            "  largest:",
        ]
        lines += [
            f"    {format_bytes(tensor.nbytes):>11}  {tensor.kind:<10} {tensor.dtype:<9} "
            f"{'x'.join(map(str, tensor.shape)):<22} {tensor.operator} in {tensor.phase}"
            for tensor in self.largest[:8]
        ]
        return "\n".join([*lines, f"  {OUTSIDE}"])

    def host_lines(self) -> list[str]:
        """What lies in the host's memory, one line; none where nothing does."""
        if not self.host:
            return []
        return [
            f"host: {format_bytes(self.host)} of pinned memory, {self.host / self.voxels:.1f} B/voxel; "
            f"a step copies {format_bytes(self.to_host)} there and {format_bytes(self.to_device)} back"
        ]

    def split_lines(self, indent: str) -> list[str]:
        """The split, one kind a line."""
        return [
            f"{indent}{kind:<10} {format_bytes(self.split[kind]):>11}  "
            f"{self.split[kind] * self.processes / self.voxels:7.1f} B/voxel  {what}"
            for kind, what in KINDS.items()
        ]
