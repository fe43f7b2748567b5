"""Tile configurations, tuned files and heuristics, which `effseg.kernels.choose` asks. Pure Python."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

INTERPRETER = "interpreter"
ATEN = "aten"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
"""Those with heuristics of their own, and for which kernels are inspected."""
SCHEMA = 1
SHIPPED = Path(__file__).parent / "tuned"
Triple = tuple[int, int, int]

LOOPS = {
    "conv3d_fwd": ("slide", "tap", "few"),
    "conv3d_dgrad": ("slide", "tap"),
    "conv3d_wgrad": ("pair3", "pair", "kw", "tap"),
    "norm_act": ("tile",),
    "norm_act_backward": ("tile",),
    "fold": ("tile",),
    "moments": ("tile",),
    "channel_sums": ("tile",),
    "upsample": ("tile",),
    "upsample_transpose": ("tile",),
    "head_sums": ("tile",),
    "head_backward": ("tile", "classes"),
    "head_argmax": ("tile",),
}
"""The main loops of each operator; every operator may also be left to ATEN."""

DTYPES = ("fp32", "bf16", "fp16")
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}
WIDE_TENSOR_MEMORY = (3, 9)
"""The Triton that keeps `slide`'s accumulators of 64 columns within tensor memory's 512; those before ask for
more, and compile that to a trap."""


@dataclass(frozen=True)
class Config:
    """loop: which main loop, of those that the operator has; block_*: voxels of a tile along D, H, W, output
    channels and depth of the contraction; splits: programs that share a reduction. 0 where a loop does not
    have it."""

    loop: str
    block_d: int = 0
    block_h: int = 0
    block_w: int = 0
    block_n: int = 0
    block_k: int = 0
    splits: int = 0
    num_warps: int = 4
    num_stages: int = 1


@dataclass(frozen=True)
class Problem:
    """op: one of LOOPS; architecture: sm_90 and the like, or INTERPRETER; dtype: one of DTYPES; in_channels,
    out_channels: of the forward operator, for its gradients too; size: (D, H, W) of what the programs tile;
    prologue: whether the input is normalised and activated as it is read; gpu: the name of its tuned files,
    empty for heuristics only; multiprocessors: that it has, 0 for as many as the architecture's largest."""

    op: str
    architecture: str
    dtype: str
    in_channels: int
    out_channels: int
    size: Triple
    kernel: Triple = (1, 1, 1)
    stride: Triple = (1, 1, 1)
    prologue: bool = False
    gpu: str = ""
    multiprocessors: int = 0


def uses_aten(config: Config) -> bool:
    return config.loop == ATEN


# Tuned files


def gpu_slug(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def cache_folder() -> Path:
    """Where a user's own measurements are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effseg" / "tuned"


def tuned_files(gpu: str) -> tuple[Path, ...]:
    """The user's file, then the shipped one; none without a GPU's name."""
    return _tuned_files(gpu, os.environ.get("XDG_CACHE_HOME"), os.environ.get("HOME"), SHIPPED) if gpu else ()


@lru_cache(maxsize=64)
def _tuned_files(gpu: str, xdg: str | None, home: str | None, shipped: Path) -> tuple[Path, ...]:
    """Remembered for what it depends on: a path takes longer to make than a configuration to look up."""
    return cache_folder() / f"{gpu}.json", shipped / f"{gpu}.json"


def bucket(size: Triple) -> int:
    """Voxels, rounded up to a power of two: problems of one bucket share an entry."""
    return power_of_two(math.prod(size))


def key(problem: Problem) -> str:
    """What an entry of a tuned file is found by."""
    channels = f"{problem.in_channels}-{problem.out_channels}"
    axes = ["x".join(map(str, triple)) for triple in (problem.kernel, problem.stride)]
    prologue = "prologue" if problem.prologue else "plain"
    return " ".join(
        [
            problem.op,
            problem.dtype,
            channels,
            f"k{axes[0]}",
            f"s{axes[1]}",
            prologue,
            f"v{bucket(problem.size)}",
        ]
    )


@lru_cache(maxsize=1)
def compilers() -> Mapping[str, str]:
    """The installed versions of what measurements depend on."""
    found = {}
    for name in ("torch", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def tuned_document(
    entries: Mapping[str, Config], measured: Mapping[str, Mapping[str, Any]] | None = None, gpu: str = ""
) -> str:
    """The text of a tuned file. measured: what else is kept of an entry, as JSON; gpu: its name."""
    notes = measured or {}
    rows = {
        name: asdict(config) | ({"measured": dict(notes[name])} if name in notes else {})
        for name, config in sorted(entries.items())
    }
    document = {"schema": SCHEMA, "gpu": gpu, "versions": dict(compilers()), "entries": rows}
    return json.dumps(document, indent=1) + "\n"


class Tuned(dict[str, Config]):
    """Entries of a tuned file by `key`, and the problems that were looked for in them."""

    def __init__(self, entries: Mapping[str, Config] | None = None) -> None:
        super().__init__(entries or {})
        self.find = lru_cache(maxsize=4096)(self._find)

    def _find(self, problem: Problem) -> Config | None:
        return self.get(key(problem))


@lru_cache(maxsize=64)
def read_tuned(path: Path) -> Tuned:
    """Entries of a tuned file, read once a process. A corrupt or stale one has none, and a warning."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Tuned()
    except (OSError, UnicodeDecodeError) as error:
        warnings.warn(f"{path} is ignored: {error}", stacklevel=3)
        return Tuned()
    try:
        return Tuned(parse_tuned(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"{path} is ignored: {error or type(error).__name__}", stacklevel=3)
        return Tuned()


def parse_tuned(text: str) -> dict[str, Config]:
    """Inverse of `tuned_document`; an error where a file is stale or an entry is not a configuration."""
    document = json.loads(text)
    if document["schema"] != SCHEMA:
        raise ValueError(f"schema {document['schema']!r}, this version reads {SCHEMA}")
    for name, installed in compilers().items():
        written = document["versions"][name]
        if written.split(".")[:2] != installed.split(".")[:2]:
            raise ValueError(f"measured with {name} {written}, installed is {installed}: run `effseg tune`")
    entries = {
        name: Config(**{field: value for field, value in entry.items() if field != "measured"})
        for name, entry in document["entries"].items()
    }
    for name, config in entries.items():
        op = name.split(" ")[0]
        wrong = [
            f.name for f in fields(config) if f.name != "loop" and type(getattr(config, f.name)) is not int
        ]
        if wrong or config.loop not in (*LOOPS.get(op, ()), ATEN):
            raise ValueError(f"entry {name!r} is not a configuration")
    return entries


# Heuristics


def nearest_known(architecture: str) -> str:
    """The newest architecture with heuristics that is not newer; the oldest for still older ones."""
    number = int(architecture.removeprefix("sm_"))
    return max((a for a in ARCHITECTURES if int(a[3:]) <= number), key=lambda a: int(a[3:]), default="sm_80")


def power_of_two(n: int) -> int:
    """The least power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


def blocks(size: int, block: int) -> int:
    """How many of `block` cover a size; `triton.cdiv` is for kernels, and slow on the host."""
    return -(-size // block)


def heuristic(problem: Problem, loop: str = "") -> Config:
    """What ahead-of-time compiles recommend: the fewest issued instructions a voxel without spills.

    loop: of a convolution, in place of that which is recommended.
    """
    if problem.op not in LOOPS:
        raise ValueError(f"op: expected one of {', '.join(LOOPS)}, got {problem.op!r}")
    if problem.dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {problem.dtype!r}")
    interpreted = problem.architecture == INTERPRETER
    if not interpreted:
        problem = replace(problem, architecture=nearest_known(problem.architecture))
    if problem.op.startswith("conv3d"):
        loop = loop or loop_of(problem)
    if interpreted:
        return _interpreted(problem, loop)
    if problem.op == "conv3d_wgrad":
        return _wgrad(problem, loop)
    if problem.op in ("conv3d_fwd", "conv3d_dgrad"):
        return _conv(problem, loop)
    if problem.op.startswith("head"):
        return _head(problem)
    return _elementwise(problem)


def by_heuristic(problem: Problem) -> Config:
    """`heuristic`, remembered."""
    return _by_heuristic(problem, _triton())


@lru_cache(maxsize=4096)
def _by_heuristic(problem: Problem, triton: tuple[int, int]) -> Config:
    """For what it depends on."""
    return heuristic(problem)


def processors(problem: Problem) -> int:
    """Multiprocessors to spread programs over."""
    return problem.multiprocessors or MULTIPROCESSORS[problem.architecture]


def contraction(problem: Problem) -> tuple[int, int]:
    """(channels that are summed over, channels that come out) of forward and dgrad."""
    channels = problem.in_channels, problem.out_channels
    return channels if problem.op == "conv3d_fwd" else channels[::-1]


def loop_of(problem: Problem) -> str:
    """The main loop of a convolution.

    The marches reuse what they have read of a 3x3x3 convolution of stride 1: forward and dgrad along D with
    rotating accumulators; wgrad over pairs of w-neighbours, which fill the 64 rows of a tensor instruction,
    and over single voxels where channels fill them.
    """
    marches = problem.kernel == (3, 3, 3) and problem.stride == (1, 1, 1)
    if problem.op == "conv3d_wgrad":
        channels = (problem.in_channels, problem.out_channels)
        oldest = problem.architecture == "sm_80"
        if marches and channels == (16, 16) and not oldest:
            return "pair3"
        if marches and all(c in (16, 32) for c in channels):
            return "pair"
        return "kw" if marches and 32 < max(channels) <= 64 and min(channels) >= 16 and not oldest else "tap"
    depth, _ = contraction(problem)
    if problem.op == "conv3d_fwd" and depth < 16:
        return "few"
    return "slide" if marches and depth <= _widest_slide(problem) else "tap"


def _widest_slide(problem: Problem) -> int:
    """Channels for which the registers hold three accumulators, and a prologue's operands beside them."""
    crowded = problem.dtype == "fp32" or problem.architecture == "sm_80"
    return 32 if crowded and problem.op == "conv3d_fwd" and problem.prologue else 64


def _padded(channels: int) -> int:
    return max(16, power_of_two(channels))


def _block_k(problem: Problem, most: int) -> int:
    """A block that divides the channels, so that none is masked, unless that takes very many turns."""
    channels, _ = contraction(problem)
    divides = channels & -channels
    spread = math.prod(problem.stride) if problem.op == "conv3d_dgrad" else 1
    many = math.prod(problem.kernel) // spread > 8
    return min(most, divides if divides >= (32 if many else 16) else _padded(channels))


def _interpreted(problem: Problem, loop: str) -> Config:
    """Time goes with programs times loop iterations, and wide tiles on tiny volumes are mostly masks."""
    padded = _padded(problem.in_channels), _padded(problem.out_channels)
    if problem.op == "conv3d_wgrad":
        block_k = min(64, 16 * power_of_two(math.prod(problem.kernel)))
        return Config(
            loop,
            block_d=3,
            block_h=4,
            block_w=8,
            block_n=min(32, padded[1]),
            block_k=block_k,
            splits=2,
        )
    if problem.op in ("conv3d_fwd", "conv3d_dgrad"):
        depth, columns = map(_padded, contraction(problem))
        block_k = 64 if loop == "few" else min(32, depth)
        return Config(loop, block_d=3, block_h=4, block_w=8, block_n=min(32, columns), block_k=block_k)
    if problem.op.startswith("upsample"):
        return Config("tile", block_d=2, block_h=8, block_w=8, block_n=min(32, padded[0]))
    return Config("tile", block_w=32, block_n=min(32, padded[0]), splits=4)


def _conv(problem: Problem, loop: str) -> Config:
    """Forward and dgrad: the largest tile whose accumulators, operands and epilogue the registers hold."""
    fp32 = problem.dtype == "fp32"
    channels, columns = map(_padded, contraction(problem))
    if loop == "slide":
        return _slide(problem, channels, columns)
    if loop == "few":
        block_k = min(64, _padded(math.prod(problem.kernel) * problem.in_channels))
        return Config(loop, block_d=8, block_h=8, block_w=16, block_n=min(64, columns), block_k=block_k)
    block_n = min(64 if fp32 else 128, columns)
    # dgrad's epilogue holds the forward pass's input beside the accumulators, and tcgen05 a prologue its own.
    crowded = problem.prologue and (problem.op == "conv3d_dgrad" or problem.architecture == "sm_100")
    return Config(
        loop,
        block_d=4,
        block_h=4 if crowded and block_n > 64 else 8,
        block_w=16,
        block_n=block_n,
        block_k=_block_k(problem, 32 if fp32 else 64),
        num_warps=8 if block_n > 32 else 4,
        num_stages=1 if crowded and block_n <= 32 and problem.op == "conv3d_fwd" else 2,
    )


def _triton() -> tuple[int, int]:
    """Major and minor version of the installed one; of none, that of the newest heuristics."""
    major, minor = compilers().get("triton", "3.9").split(".")[:2]
    return int(major), int(minor)


def _slide(problem: Problem, channels: int, columns: int) -> Config:
    """mma, unlike wgmma, reads both operands from registers; a larger tile of 64 channels exceeds the tensor
    memory of `WIDE_TENSOR_MEMORY`'s predecessors."""
    fp32, oldest = problem.dtype == "fp32", problem.architecture == "sm_80"
    small = fp32 or channels > {"sm_80": 16, "sm_90": 64, "sm_100": 32}[problem.architecture]
    crowded = problem.architecture == "sm_100" and not small and _triton() < WIDE_TENSOR_MEMORY
    block_n = min(32 if fp32 or oldest or crowded else 64, columns)
    narrow = 32 if oldest and not (fp32 and problem.op == "conv3d_fwd") else 16
    return Config(
        "slide",
        block_d=32,
        block_h=8,
        block_w=8 if small else 16,
        block_n=block_n,
        num_warps=4 if max(channels, block_n) <= narrow else 8,
    )


def _wgrad(problem: Problem, loop: str) -> Config:
    """Without a prologue loads are pipelined in shared memory; with one they pass through registers."""
    fp32, oldest = problem.dtype == "fp32", problem.architecture == "sm_80"
    programs = processors(problem)
    if loop == "tap":
        return _wgrad_tap(problem, programs)
    crowded = oldest and loop == "pair" and problem.in_channels > 16
    few_warps = oldest and loop == "pair" and max(problem.in_channels, problem.out_channels) == 16
    return Config(
        loop,
        block_d=32,
        block_h=2 if fp32 or crowded else 4,
        block_w=8 if crowded and problem.prologue and not fp32 else 16,
        splits=programs if loop == "pair3" else programs // 3,
        num_warps=4 if few_warps and problem.prologue else 8,
        num_stages=1 if fp32 or problem.prologue else 2,
    )


def _wgrad_tap(problem: Problem, processors: int) -> Config:
    """rows, the product's first axis, are taps times input channels."""
    fp32, oldest = problem.dtype == "fp32", problem.architecture == "sm_80"
    rows = problem.in_channels * math.prod(problem.kernel)
    columns = _padded(problem.out_channels)
    if rows <= 32:  # a network's first layer
        return Config(
            "tap", block_h=8, block_w=16, block_n=min(32, columns), block_k=32, splits=8 * processors
        )
    block_n = min(64 if fp32 or problem.prologue else 128, columns)
    block_k = min(64 if fp32 else 128, power_of_two(rows))
    blocks = math.ceil(rows / block_k) * math.ceil(problem.out_channels / block_n)
    return Config(
        "tap",
        block_h=4,
        block_w=16,
        block_n=block_n,
        block_k=block_k,
        splits=max(1, round(2 * processors / blocks)),
        num_warps=8 if block_n > 64 else 4,
        num_stages=1 if problem.prologue else 2 if oldest or fp32 else 3,
    )


def _head(problem: Problem) -> Config:
    """Sums are kept for every logit of a tile, and a thread has registers for 16 of them at most."""
    channels, classes = _padded(problem.in_channels), _padded(problem.out_channels)
    oldest, backward = problem.architecture == "sm_80", problem.op == "head_backward"
    if problem.op == "head_argmax":
        return Config("tile", block_w=max(16, min(64, 8192 // classes)), splits=512)
    logits = 1024 if oldest or problem.dtype == "fp32" or channels > 64 else 2048
    if backward and (classes > 16 or channels > 32):
        logits = 1024 if channels <= 64 else 512
    wide = classes > 128 or (backward and classes >= 128 and channels >= 128)
    return Config(
        "classes" if backward and classes >= 64 and (oldest or channels not in (32, 64)) else "tile",
        block_w=max(16, logits // classes),
        splits=512,
        num_warps=8 if wide else 4,
    )


def _elementwise(problem: Problem) -> Config:
    """Tiles of whole 16-byte loads, as many as leave registers for several programs a multiprocessor."""
    block_n = min(64, power_of_two(problem.in_channels))
    # Values that four warps read with one instruction.
    one_load = 4 * 32 * (4 if problem.dtype == "fp32" else 8)
    if problem.op.startswith("upsample"):
        return Config(
            "tile", block_d=8, block_h=4, block_w=max(1, one_load // (4 * block_n)), block_n=block_n
        )
    resident = 4 if problem.op == "norm_act_backward" else 8
    loads = 2 if problem.op in ("norm_act_backward", "moments") else 4
    splits = resident * processors(problem)
    return Config("tile", block_w=loads * one_load // block_n, block_n=block_n, splits=splits)
