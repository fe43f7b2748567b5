"""Ahead-of-time compilation, and what the result says without a GPU.

`compiled` takes a launch that `effseg.kernels.launch.recording` caught through Triton's own path, so that its
arguments are specialised exactly as on a GPU. cuobjdump and nvdisasm come with Triton, as ptxas does.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from effseg.inspection import sass
from effseg.kernels.launch import Launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Driver:
    """As much of a Triton driver as compiling asks for: the target."""

    def __init__(self, architecture: str) -> None:
        self.capability = int(architecture.removeprefix("sm_"))

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class Pointer:
    """A tensor as the compiler sees it: a type, and an address of which the alignment counts."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self.offset = int(tensor.storage_offset()) * tensor.itemsize

    def data_ptr(self) -> int:
        return self.offset

    @staticmethod
    def ptr_range() -> int:
        return 0


def compiled(launch: Launch, architecture: str) -> Any:
    """Triton's CompiledKernel of a recorded launch, for "sm_90" and the like; a GPU is then out of reach."""
    driver.set_active(Driver(architecture))
    return launch.kernel.warmup(*_arguments(launch), grid=launch.grid, **launch.options)


def specialisation(launch: Launch, architecture: str) -> str:
    """What a recorded launch is compiled for: those that have the same share a compilation."""
    device = Driver(architecture)
    driver.set_active(device)
    *_, binder = launch.kernel.device_caches[device.get_current_device()]
    _, specialised, options = binder(*_arguments(launch), **launch.options)
    return f"{launch.kernel.__name__} {specialised} {options}"


def _arguments(launch: Launch) -> list[Any]:
    return [Pointer(arg) if isinstance(arg, torch.Tensor) else arg for arg in launch.args]


@dataclass(frozen=True)
class Stretch:
    """The interior way through a stretch of code. issue: clocks that the four schedulers of a multiprocessor
    take to issue it for all warps of a program; flops: of its tensor cores; loads: by bytes a thread."""

    issue: float
    flops: int
    loads: dict[int, int]


@dataclass(frozen=True)
class Report:
    """spills: instructions that reach local memory; shared: bytes; mma: tensor instructions by name; main: a
    turn of the loop that multiplies (else that reads, else all code), a mean one where they are unrolled;
    around: a turn of what encloses it."""

    registers: int
    spills: int
    shared: int
    mma: dict[str, int]
    main: Stretch
    around: Stretch


def examined(kernel: Any) -> Report:
    """What the machine code of a CompiledKernel says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        code = sass.parse(_tool("nvdisasm", "-c", cubin.name))
    warps = kernel.metadata.num_warps
    mma = Counter(i.mma for i in code.instructions if i.mma)
    main, around = sass.main_and_around(code, flops_of(kernel.asm["ptx"], warps) if mma else bytes_loaded)

    def stretch(path: sass.Path) -> Stretch:
        loads = sorted(code.loads(path.blocks).items(), reverse=True)
        return Stretch(
            path.instructions * warps / 4 / path.turns,
            path.work // path.turns if mma else 0,
            {width: math.ceil(count / path.turns) for width, count in loads},
        )

    return Report(
        registers=int(_groups(r"REG:(\d+)", usage)[0]),
        spills=code.spills,
        shared=kernel.metadata.shared,
        mma=dict(mma),
        main=stretch(main),
        around=stretch(around),
    )


def _groups(pattern: str, text: str) -> tuple[str, ...]:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{pattern!r} is not in {text!r}: another version's machine code")
    return found.groups()


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def bytes_loaded(instruction: sass.Instruction) -> int:
    """Of global memory, by a thread."""
    kind, width = instruction.access
    return width if kind == "load" else 0


def flops_of(ptx: str, warps: int) -> Callable[[sass.Instruction], int]:
    """Function of an instruction: what a program of so many warps multiplies and adds with it.

    HGMMA is issued by each group of four warps, HMMA by each warp, tcgen05's by one thread for the program;
    the last has its shape in a register, in PTX a constant.
    """
    descriptors = _tcgen05_descriptors(ptx)

    def flops(instruction: sass.Instruction) -> int:
        kind = instruction.mma
        if kind == "HGMMA":
            m, n, k = map(int, _groups(r"\.(\d+)x(\d+)x(\d+)\.", instruction.text))
            return 2 * m * n * k * warps // 4
        if kind == "HMMA":
            # .16816: 16x8x16; .1688: 16x8x8.
            k = int(_groups(r"\.168(\d+)", instruction.text)[0])
            return 2 * 16 * 8 * k * warps
        return descriptors if kind else 0

    return flops


def _tcgen05_descriptors(ptx: str) -> int:
    """Floating-point operations of a kernel's tcgen05.mma; of the smallest where it has several."""
    constants = dict(re.findall(r"mov\.b32\s+(%r\d+), (\d+);", ptx))
    found = []
    for kind, register in re.findall(
        r"tcgen05\.mma\.\S*kind::(\w+) \[[^]]*\], (?:\[[^]]*\]|%rd\d+), %rd\d+, (%r\d+)", ptx
    ):
        if register in constants:
            bits = int(constants[register])
            m, n = (bits >> 24 & 0x1F) * 16, (bits >> 17 & 0x3F) * 8
            found.append(2 * m * n * (8 if kind == "tf32" else 16))
    return min(found, default=0)
