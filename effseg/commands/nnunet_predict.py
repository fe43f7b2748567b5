"""`effseg nnunet predict -m MODEL`: prediction with any model folder of nnU-Net's, in bounded memory."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from effseg.errors import InputError

MODEL = "-m"
DESCRIPTION = """Segment scans with a trained nnU-Net v2 model, 2d, 3d_fullres or 3d_lowres, as
nnUNetv2_predict does, but with the logits of no more planes in memory than a window is thick. Weights are
read without executing anything in the checkpoint. Without -m, with -d and -c as of nnUNetv2_predict, nnU-Net
itself predicts with models of this package's trainers."""


def asked_for(arguments: Sequence[str]) -> bool:
    """Whether this is for a model folder, or for help."""
    return bool({MODEL, "-h", "--help"} & set(arguments))


def predict(arguments: Sequence[str]) -> None:
    """Raises InputError for arguments, models and scans that cannot be used."""
    from effseg.nnunet.prediction.predictor import Predictor

    args = _parser().parse_args(arguments)
    if args.prev_stage_predictions is not None:
        raise InputError("-prev_stage_predictions: cascades are not supported: use nnUNetv2_predict")
    predictor = Predictor(
        args.m,
        _folds(args.f),
        args.chk,
        device=args.device,
        step=args.step_size,
        mirror=not args.disable_tta,
        dtype=args.dtype,
        batch=args.batch_size,
        on_device=not args.not_on_device,
        compiled=args.compile,
    )
    with _Progress(shown=not args.disable_progress_bar) as progress:
        written = predictor.predict_folder(
            args.i,
            args.o,
            save_probabilities=args.save_probabilities,
            resume=args.continue_prediction,
            part=args.part_id,
            parts=args.num_parts,
            ahead=not args.npp == args.nps == 0,
            tell=progress,
        )
    for path in written:
        print(path)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see `{self.prog} --help`)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="effseg nnunet predict", description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("-i", type=Path, required=True, metavar="FOLDER", help="scans NAME_0000, one file a channel")
    add("-o", type=Path, required=True, metavar="FOLDER", help="where labels are written, made if needed")
    add(MODEL, type=Path, required=True, metavar="FOLDER", help="the model: TRAINER__PLANS__CONFIGURATION")
    add("-f", nargs="+", metavar="FOLD", help="folds to average, numbers or all (default: those there are)")
    add("-chk", default="checkpoint_final.pth", metavar="NAME", help="checkpoint (default: %(default)s)")
    add("-step_size", type=float, default=0.5, metavar="SHARE", help="of a window (default: %(default)s)")
    add("--disable_tta", action="store_true", help="without mirrored windows: faster, less accurate")
    add("--save_probabilities", "--save-probabilities", action="store_true", help="NAME.npz and NAME.pkl too")
    add("--continue_prediction", "--c", action="store_true", help="leave what has been predicted")
    add("-num_parts", type=int, default=1, metavar="N", help="calls that share the scans (default: 1)")
    add("-part_id", type=int, default=0, metavar="I", help="which of them this is, from 0 (default: 0)")
    add("-device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--dtype", default="auto", help="fp16, bf16 or fp32 (default: fp16 on a GPU, else fp32)")
    add("--batch_size", type=int, metavar="N", help="windows at a time (default: 4 on a GPU, else 1)")
    add("--not_on_device", action="store_true", help="hold the sums of logits in main memory")
    add("--compile", action="store_true", help="run the network through torch.compile")
    add("--disable_progress_bar", action="store_true", help="no progress bar")
    add("-npp", type=int, default=1, metavar="N", help="0, with -nps 0: read and write between scans")
    add("-nps", type=int, default=1, metavar="N", help="see -npp")
    add("-prev_stage_predictions", metavar="FOLDER", help="refused: cascades are not supported")
    add("--verbose", action="store_true", help="accepted, without effect")
    return parser


def _folds(names: Sequence[str] | None) -> list[int | str] | None:
    if names is None:
        return None
    for name in names:
        if name != "all" and not name.isdecimal():
            raise InputError(f"-f: expected numbers or all, got {name!r}")
    return [name if name == "all" else int(name) for name in names]


class _Progress:
    """A bar of windows for every scan, on stderr, where that is a terminal."""

    def __init__(self, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, disable=not (shown and console.is_terminal))
        self.task: Any = None
        self.name = ""

    def __enter__(self) -> "_Progress":
        self.bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.bar.stop()

    def __call__(self, name: str, done: int, total: int) -> None:
        if name != self.name:
            self.name, self.task = name, self.bar.add_task(name, total=total)
        self.bar.update(self.task, completed=done)
