"""Is this installation sound? Versions, GPU, known faults of neighbours, and a check of the arithmetic."""

import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from effseg.models.effsegnet import EffSegNet
from effseg.models.stock import StockEffSegNet
from effseg.version import __version__

PACKAGES = (
    "torch", "triton", "numpy", "nibabel", "monai", "rich", "matplotlib", "safetensors", "scipy",
    "tensorboardX",
)  # fmt: skip
# Triton has wheels for one platform, and nothing needs it elsewhere.
OPTIONAL = ("triton",)

Version = tuple[int, ...]


@dataclass(frozen=True)
class Check:
    """One answer. state: ok, warning (slower, or unable to do something), or fault (do not train with it)."""

    name: str
    state: str
    detail: str


@dataclass(frozen=True)
class KnownFault:
    """A fault where torch_from <= torch < torch_before and cudnn_from <= cuDNN < cudnn_before."""

    url: str
    what: str
    torch_from: Version
    torch_before: Version
    cudnn_from: Version
    cudnn_before: Version


KNOWN_FAULTS = (
    KnownFault(
        "https://github.com/pytorch/pytorch/issues/163539",
        "bf16 conv3d is silently wrong on large volumes: use cuDNN 9.13 or later, or torch 2.10 or later",
        (0,), (2, 9), (9, 8), (9, 13),
    ),
    KnownFault(
        "https://github.com/pytorch/pytorch/pull/167024",
        "fp32 conv3d in TF32 can be wrong: set torch.backends.cudnn.allow_tf32 = False, or use torch 2.10 or "
        "later",
        (0,), (2, 9, 1), (9, 10, 2), (9, 15),
    ),
    KnownFault(
        "https://github.com/pytorch/pytorch/issues/166643",
        "bf16 conv3d runs without cuDNN and takes several times the memory: use cuDNN 9.15 or later with "
        "torch 2.9.1 or later",
        (2, 9), (99,), (0,), (9, 15),
    ),
    KnownFault(
        "https://github.com/pytorch/pytorch/issues/166122",
        "conv3d under autocast is about 4 times slower, whatever cuDNN: use torch 2.9.1 or later",
        (2, 9), (2, 9, 1), (0,), (99,),
    ),
)  # fmt: skip

# The volume of the arithmetic check: odd sizes, several slabs, more than one voxel at the coarsest level.
SHAPE = (1, 1, 35, 21, 18)
CLASSES = 3


def diagnose() -> dict[str, Any]:
    """Everything: {"ok", "versions", "gpus", "checks"}, JSON-able; ok: no check found a fault."""
    checks = [*check_versions(), *check_gpus(), *check_known_faults(*torch_and_cudnn()), *check_arithmetic()]
    return {
        "ok": all(check.state != "fault" for check in checks),
        "versions": versions(),
        "gpus": gpus(),
        "checks": [asdict(check) for check in checks],
    }


def versions() -> dict[str, str | None]:
    """Versions of what takes part; None: not there."""
    _, cudnn = torch_and_cudnn()
    found: dict[str, str | None] = {"effseg": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["cuda"] = torch.version.cuda
    found["cudnn"] = None if cudnn is None else ".".join(map(str, cudnn))
    return found


def gpus() -> list[dict[str, Any]]:
    """Name, memory in bytes and compute capability of every visible GPU."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append({"name": properties.name, "memory": properties.total_memory, "capability": capability})
    return found


def torch_and_cudnn() -> tuple[Version, Version | None]:
    """The running torch's version, and cuDNN's, None without a GPU to use it."""
    number = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return parse_version(torch.__version__), None if number is None else parse_cudnn(number)


def parse_version(text: str) -> Version:
    """'2.13.0+cpu' -> (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def parse_cudnn(number: int) -> Version:
    """torch.backends.cudnn.version(): 91002 is 9.10.2, 8902 (until cuDNN 8) is 8.9.2."""
    major = 10_000 if number >= 90_000 else 1_000
    return number // major, number % major // 100, number % 100


def check_versions() -> Iterator[Check]:
    found = versions()
    missing = [name for name in PACKAGES if found[name] is None and name not in OPTIONAL]
    if missing:
        yield Check("packages", "fault", f"not installed: {', '.join(missing)}")
    else:
        yield Check("packages", "ok", "all installed")
    if parse_version(torch.__version__) < (2, 6):
        yield Check("torch", "fault", f"2.6 or later is needed, this is {torch.__version__}")


def check_gpus() -> Iterator[Check]:
    if not gpus():
        yield Check("gpu", "ok", "none visible to torch: everything runs on the CPU")
    for gpu in gpus():
        state, detail = (
            "ok",
            f"{gpu['name']}, {gpu['memory'] / 2**30:.1f} GiB, capability {gpu['capability']}",
        )
        if parse_version(gpu["capability"]) < (8, 0):
            state, detail = "warning", f"{detail}: no bfloat16 in hardware, train in fp32"
        yield Check("gpu", state, detail)


def check_known_faults(torch_version: Version, cudnn: Version | None) -> Iterator[Check]:
    """Whether this pair is known to be bad; without cuDNN none applies."""
    if cudnn is None:
        yield Check("torch and cuDNN", "ok", "no cuDNN in use")
        return
    hit = [
        fault
        for fault in KNOWN_FAULTS
        if fault.torch_from <= torch_version < fault.torch_before
        and fault.cudnn_from <= cudnn < fault.cudnn_before
    ]
    for fault in hit:
        yield Check("torch and cuDNN", "fault", f"{fault.what} ({fault.url})")
    if not hit:
        pair = " and ".join(".".join(map(str, version)) for version in (torch_version, cudnn))
        yield Check("torch and cuDNN", "ok", f"no known fault of {pair}")


def check_arithmetic() -> Iterator[Check]:
    """EffSegNet's loss and gradients against the same network in stock torch, float64, on every device; on a
    GPU also the loss in fp32 and in bf16 against the CPU's in float64."""
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    expected, expected_gradient = loss_and_gradient(StockEffSegNet, "cpu", torch.float64)
    for device in devices:
        loss, gradient = loss_and_gradient(EffSegNet, device, torch.float64)
        error = max(relative_error(loss, expected), relative_error(gradient, expected_gradient))
        yield _judged(f"arithmetic on {device}, float64", error, 1e-9)
        if device != "cpu":
            for dtype, bar in ((torch.float32, 1e-3), (torch.bfloat16, 5e-2)):
                loss, gradient = loss_and_gradient(EffSegNet, device, dtype)
                error = relative_error(loss, expected) if bool(gradient.isfinite().all()) else float("inf")
                yield _judged(f"loss on {device}, {str(dtype).removeprefix('torch.')}", error, bar)


def loss_and_gradient(
    network: type[EffSegNet], device: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and all gradients in one vector, both float64 on the CPU; weights and data are always the same.
    bfloat16 is autocast over float32 weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network(1, CLASSES)
        image = torch.randn(SHAPE, dtype=torch.float64)
        labels = torch.randint(0, CLASSES, (SHAPE[0], *SHAPE[2:]), dtype=torch.uint8)
    low = dtype == torch.bfloat16
    weights = torch.float32 if low else dtype
    model.to(device, weights)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=low):
        loss = model.loss(image.to(device, weights), labels.to(device))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach().double().cpu(), torch.cat([g.double().flatten() for g in gradients]).cpu()


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def _judged(name: str, error: float, bar: float) -> Check:
    return Check(name, "ok" if error <= bar else "fault", f"relative error {error:.1e}, allowed {bar:.0e}")
