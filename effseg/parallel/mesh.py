"""Processes as a mesh of data x volume, and the block in which they share a volume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from effseg.parallel.partition import Split, entered
from effseg.parallel.transport import Processes

AXES = ("data", "volume")


def mesh(volume: int, data: int = 1, device: str | None = None) -> DeviceMesh:
    """All processes as `data` groups of `volume` processes: the processes of a group share a volume, so they
    should be those of one machine, whose ranks follow each other.

    device: "cpu" (gloo) or "cuda" (NCCL), by default what the process group was started with. Collective:
    every process calls it with the same numbers. Raises `ValueError` where they are not data x volume, or
    torch.distributed has not been initialised.
    """
    if not dist.is_initialized():
        raise ValueError("mesh: expected torch.distributed.init_process_group to have been called")
    for name, value in (("volume", volume), ("data", data)):
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    if data * volume != dist.get_world_size():
        raise ValueError(
            f"mesh: expected data x volume = {dist.get_world_size()} processes, got {data} x {volume}"
        )
    if device is None:
        device = "cuda" if "nccl" in dist.get_backend() else "cpu"
    return init_device_mesh(device, (data, volume), mesh_dim_names=AXES)


def rows(shape: Sequence[int], mesh: DeviceMesh) -> slice:
    """This process's rows of the first spatial axis of a whole image (..., D, H, W): `image[:, :, rows]`.

    Raises `ValueError` where there are fewer rows than processes.
    """
    split, total = split_of(mesh), shape[-3]
    if total < split.size:
        raise ValueError(
            f"shape: expected a row or more for each of {split.size} processes, got {total} rows"
        )
    return slice(*split.rows(total))


@contextmanager
def split(mesh: DeviceMesh) -> Iterator[None]:
    """Inside, every image is this process's rows of a volume that the mesh's volume group shares, and results
    and gradients are those of the whole volume: see the README of this folder. Backward may run outside."""
    with entered(split_of(mesh) if mesh.size(AXES.index("volume")) > 1 else None):
        yield


def split_of(mesh: DeviceMesh) -> Split:
    """The place of this process among those that share its volume."""
    names = mesh.mesh_dim_names or ()
    if "volume" not in names:
        raise ValueError(f"mesh: expected one with an axis called volume, got {names}")
    return Split(Processes(mesh.get_group("volume")))


def data_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The processes that hold the same rows of other volumes: the `process_group` of a loss whose sums are
    to be taken over all volumes of a batch."""
    return mesh.get_group("data")


def device_of(mesh: DeviceMesh) -> torch.device:
    return torch.device(mesh.device_type)
