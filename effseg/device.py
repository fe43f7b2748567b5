"""The device that a command runs on."""

import torch

from effseg.errors import InputError


def find_device(name: str, index: int = 0) -> torch.device:
    """The device called "auto", "cpu", "cuda" or "cuda:N"; `index` is meant where no N is given.

    "auto" is the GPU where there is one. Raises InputError for another name or a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise InputError(f"device: {name} asked for, but torch {torch.__version__} finds no CUDA GPU")
    device = torch.device("cuda", index if device.index is None else device.index)
    if device.index >= torch.cuda.device_count():
        raise InputError(f"device: {device} asked for, but there are {torch.cuda.device_count()} GPUs")
    return device
