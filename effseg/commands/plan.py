"""`effseg plan`: does it fit, and what would?"""

import argparse
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from effseg.errors import InputError
from effseg.memory.report import OUTSIDE, MemoryReport
from effseg.memory.units import format_bytes, parse_bytes, parse_volume
from effseg.models.registry import MODEL_NAMES
from effseg.planning.network_plan import MODES, NetworkPlan, Tell, plan_network
from effseg.planning.nnunet_plans import Size, read_plans
from effseg.planning.planner import BASELINE, HEADROOM, MEMORY, Mode, Plan, Request, plan, total_gpu_memory

HELP = """Predict the GPU memory of a training step on a whole volume (forward, loss, backward, optimizer) in
every memory mode, without a GPU and without the memory, choose the mode with the least arithmetic that fits,
and find the largest volume that does; takes about a minute. With --network the same for nnU-Net's plans:
their network as it is and converted, on its patches and on whole volumes. Exit code 0 if the volume, or the
plans' patches, fit, 1 if not."""

PREDICTIONS = 4  # in most modes: the patch, the whole volume, the largest patch and the next size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--volume", metavar="XxYxZ", help="voxels, as in 512x512x300")
    what.add_argument(
        "--network", type=Path, metavar="PLANS.json", help="nnU-Net's plans, instead of --volume and --model"
    )
    parser.add_argument("--configuration", default="3d_fullres", help="of the plans (default: %(default)s)")
    parser.add_argument(
        "--classes", type=int, help="classes, background included; with --network those of its dataset.json"
    )
    parser.add_argument(
        "--gpu-memory",
        metavar="SIZE",
        help="24GB is 24e9 bytes, 24GiB 24 * 2**30; default: the GPU here",
    )
    parser.add_argument("--model", choices=MODEL_NAMES, default="effseg-base", help="default: %(default)s")
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp32"),
        default="bf16",
        help="bf16 (default): autocast, fp32 weights",
    )
    parser.add_argument("--channels", type=int, default=1, help="channels of the image (default: 1)")
    parser.add_argument("--batch", type=int, help="volumes in a step (default: 1, or that of the plans)")
    parser.add_argument(
        "--optimizer", choices=("adamw", "sgd"), help="default: adamw, with --network nnU-Net's sgd"
    )
    parser.add_argument(
        "--memory",
        choices=MEMORY,
        default="auto",
        help="auto (default): the mode with the least arithmetic that fits",
    )
    parser.add_argument(
        "--headroom",
        type=float,
        default=HEADROOM,
        metavar="FRACTION",
        help="part of the GPU's memory left to what the prediction cannot see (default: %(default)s)",
    )
    parser.add_argument(
        "--gpus", type=int, default=1, help="that share a volume; the figures are those of one (default: 1)"
    )
    parser.add_argument(
        "--offload",
        action="store_true",
        help="also look at modes that keep the half-resolution level in the host's memory, pinned",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    memory = total_gpu_memory() if args.gpu_memory is None else parse_bytes(args.gpu_memory)
    if args.network is not None:
        if args.gpus != 1:
            raise InputError(f"--gpus: expected 1 with --network, got {args.gpus}")
        if args.offload:
            raise InputError("--offload: expected --volume, got --network")
        found = _plan_network(args, memory)
        print(json.dumps(found.to_dict(), indent=2) if args.json else found)
        return 0 if found.fits else 1
    if args.classes is None:
        raise InputError("--classes: expected the number of classes, background included, with --volume")
    request = Request(
        volume=parse_volume(args.volume),
        classes=args.classes,
        model=args.model,
        dtype=args.dtype,
        channels=args.channels,
        batch=1 if args.batch is None else args.batch,
        optimizer=args.optimizer or "adamw",
        memory=args.memory,
        gpus=args.gpus,
        offload=args.offload,
    )
    answer = plan(request, memory, args.headroom)
    print(json.dumps(answer.to_dict(), indent=2) if args.json else _text(answer))
    return 0 if answer.fits else 1


def _plan_network(args: argparse.Namespace, memory: int) -> NetworkPlan:
    network = read_plans(args.network, args.configuration, args.classes)
    gc.collect()
    gc.freeze()  # what has been imported is not looked through again before every prediction
    with _progress() as told:
        return plan_network(
            network,
            memory,
            dtype=args.dtype,
            batch=args.batch,
            optimizer=args.optimizer or "sgd",
            headroom=args.headroom,
            tell=told,
        )


@contextmanager
def _progress() -> Iterator[Tell]:
    """A bar on stderr, where that is a terminal: one step for every prediction that is begun."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(MODES) * PREDICTIONS, completed=-1)

        def told(mode: str | None, size: Size) -> None:
            bar.update(task, advance=1, description=f"{mode or 'as it is'} {'x'.join(map(str, size))}")

        yield told


def _text(answer: Plan) -> str:
    request, report = answer.request, answer.report
    size = "x".join(map(str, request.volume))
    x, y, _ = request.volume
    need, usable, memory = map(format_bytes, (report.reserved, answer.usable, answer.gpu_memory))
    lines = [
        f"{'Fits' if answer.fits else 'Does not fit'}: training {report.model} on {size}, "
        f"batch {request.batch}, {request.classes} classes, {request.dtype}: "
        f"needs {need}, usable {usable} of {memory}" + (" each" if request.gpus > 1 else ""),
    ]
    if answer.mode.settings is not None:
        lines.append(f"Memory mode: {_mode(answer.mode)}")
    if request.gpus > 1:
        lines.append(
            f"Each of {request.gpus} GPUs holds {-(-x // request.gpus)} of {x} rows or fewer, and sends "
            f"{format_bytes(report.sent)} a step in {report.messages} tensors and the parameters' gradients"
        )
    lines += ["", _line(report), *report.split_lines("    "), f"    {report.where}"]
    lines += [f"    {line}" for line in report.host_lines()]
    if request.model != BASELINE:
        share = report.reserved / answer.baseline.reserved
        alone = "" if request.gpus == 1 else ", which cannot be shared"
        lines += [_line(answer.baseline) + alone, f"    {report.model} needs {share:.1%} of that"]
        lines += ["", *map(_row, answer.modes)]
    lines += [
        "",
        f"Largest that fits: cube {_size(answer.largest_cube, answer.largest_cube, answer.largest_cube)}, "
        f"slices {_size(x, y, answer.largest_slices)}",
        OUTSIDE,
    ]
    return "\n".join(lines)


def _line(report: MemoryReport) -> str:
    return (
        f"{report.model:<12} {format_bytes(report.reserved):>11} reserved, {format_bytes(report.peak)} in "
        f"tensors, {report.bytes_per_voxel:.1f} B/voxel, "
        f"{report.parameters / 1e6:.2f} M parameters"
    )


def _mode(mode: Mode) -> str:
    slab = "" if mode.slab_elements is None else f" ({mode.slab_elements} elements)"
    return f"{mode.settings}{slab}, {mode.arithmetic:.2f} times the arithmetic of raw"


def _row(mode: Mode) -> str:
    report = mode.report
    host = f"  host {format_bytes(report.host)}" if report.host else ""
    return (
        f"{mode.settings!s:<44} {format_bytes(report.reserved):>11} reserved  "
        f"{report.bytes_per_voxel:7.1f} B/voxel in tensors  "
        f"arithmetic {mode.arithmetic:.2f}{host}"
    )


def _size(*sizes: int) -> str:
    return "none" if 0 in sizes else "x".join(map(str, sizes))
