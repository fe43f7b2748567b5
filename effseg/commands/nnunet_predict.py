"""`effseg nnunet predict`: prediction with nnU-Net's models, in bounded memory."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effseg.common.arguments import Parser
from effseg.errors import InputError

DESCRIPTION = """Segment scans with a trained nnU-Net v2 model, 2d, 3d_fullres, 3d_lowres or the second
stage of a cascade, as nnUNetv2_predict does, but with the logits of no more planes in memory than a
window is thick. Weights are read without executing anything in the checkpoint. The model is a folder, -m,
or named as for nnUNetv2_predict: -d, -c, -p, -tr. Models of trainers from elsewhere and of whole volumes,
where named by -d, are left to nnU-Net's own predictor and its arguments."""


def takes(arguments: Sequence[str]) -> bool:
    """Whether these are for `predict` below: a folder, help, or a model of which it knows the trainer."""
    if {"-h", "--help"} & set(arguments) or names_folder(arguments):
        return True
    given = _given(arguments, "-tr")
    from effseg.nnunet.prediction.trainers import knows

    return knows(given.tr)


def names_folder(arguments: Sequence[str]) -> bool:
    """Whether the model is told by -m: then nnU-Net's folder variables are not needed."""
    return _given(arguments, "-m").m is not None


def predict(arguments: Sequence[str]) -> None:
    """Raises InputError for arguments, models and scans that cannot be used."""
    args = _parser().parse_args(arguments)
    folder = _model_folder(args)
    from effseg.nnunet.prediction.predictor import Predictor

    predictor = Predictor(
        folder,
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
    folds = predictor.model.folds
    if args.f is None:
        print(f"averages fold{'s' * (len(folds) > 1)} {', '.join(map(str, folds))}", file=sys.stderr)
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
            previous=args.prev_stage_predictions,
        )
    for path in written:
        print(path)


def _model_folder(args: argparse.Namespace) -> Path:
    if args.m is not None:
        if args.d is not None:
            raise InputError("-d: expected none with -m, which names the model's folder")
        found: Path = args.m
        return found
    if args.d is None or args.c is None:
        raise InputError("-m: expected a model's folder, or -d and -c that name one, got neither")
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    try:
        return Path(get_output_folder(args.d, args.tr, args.p, args.c))
    except RuntimeError as error:
        raise InputError(f"-d: {error}") from None


def _given(arguments: Sequence[str], *names: str) -> argparse.Namespace:
    """Single options among others, written in any way that argparse takes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(name)
    return parser.parse_known_args([*arguments])[0]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="effseg nnunet predict", description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("-i", type=Path, required=True, metavar="FOLDER", help="scans NAME_0000, one file a channel")
    add("-o", type=Path, required=True, metavar="FOLDER", help="where labels are written, made if needed")
    add("-m", type=Path, metavar="FOLDER", help="the model: a folder TRAINER__PLANS__CONFIGURATION")
    add("-d", metavar="DATASET", help="name or number of the model's dataset, instead of -m")
    add("-c", metavar="CONFIGURATION", help="of the model, with -d")
    add("-p", default="nnUNetPlans", metavar="PLANS", help="of the model, with -d (default: %(default)s)")
    add(
        "-tr",
        default="nnUNetTrainerEffSeg",
        metavar="TRAINER",
        help="of the model, with -d (default: %(default)s)",
    )
    add(
        "-f", nargs="+", metavar="FOLD", help="folds to average, numbers or all (default: every one there is)"
    )
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
    add(
        "-prev_stage_predictions",
        type=Path,
        metavar="FOLDER",
        help="of a cascade's second stage: labels of the same scans by the first one",
    )
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
