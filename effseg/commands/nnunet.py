"""`effseg nnunet`: nnU-Net with this package's trainers."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module, metadata
from typing import Any

from effseg.commands import nnunet_predict
from effseg.errors import InputError
from effseg.nnunet import announce

HELP = """Run nnU-Net (2.8 or newer) with this package's trainers, which it finds without being changed.
nnUNetTrainerEffSeg, the trainer of `train` and `predict` unless -tr names another, is nnU-Net's in less
memory; nnUNetTrainerEffSegFull trains an EffSegNet on whole volumes. `predict` segments with these models
and all of nnU-Net's own, in bounded memory: see `effseg nnunet predict --help`. All other arguments are
nnU-Net's: `effseg nnunet train --help` shows them. Environment: EFFSEG_MEMORY (the network's memory mode),
EFFSEG_MEMORY_BUDGET (of mode auto), EFFSEG_NNUNET_EPOCHS and EFFSEG_NNUNET_ITERATIONS (of an epoch)."""

OLDEST = (2, 8)  # that looks for trainers outside of itself
TRAINER = "nnUNetTrainerEffSeg"
PREDICTION = "nnunetv2.inference.predict_from_raw_data"
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=ACTIONS, help="what nnU-Net is to do")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="nnU-Net's own")


def run(args: argparse.Namespace) -> int:
    _check_installation()
    if not {"-h", "--help"} & set(args.arguments) and not _names_folder(args):
        _check_folders()
    announce()
    ACTIONS[args.action](args.arguments)
    return 0


def _names_folder(args: argparse.Namespace) -> bool:
    return args.action == "predict" and nnunet_predict.names_folder(args.arguments)


def _check_installation() -> None:
    try:
        version = metadata.version("nnunetv2")
    except metadata.PackageNotFoundError:
        raise InputError("nnU-Net is not installed: pip install nnunetv2") from None
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        raise InputError(f"nnU-Net: expected version 2.8 or newer, got {version}: pip install -U nnunetv2")


def _check_folders() -> None:
    for name in FOLDERS:
        if not os.environ.get(name):
            raise InputError(f"{name}: nnU-Net expects a folder in this environment variable, it is not set")


def _train(arguments: Sequence[str]) -> None:
    _call("nnunetv2.run.run_training", "run_training_entry", _with_trainer(arguments))


def _predict(arguments: Sequence[str]) -> None:
    """nnU-Net's entry point looks its predictor up by name."""
    arguments = _with_trainer(arguments)
    if nnunet_predict.takes(arguments):
        nnunet_predict.predict(arguments)
        return
    from effseg.nnunet.predictor import Predictor

    with _replaced(import_module(PREDICTION), "nnUNetPredictor", Predictor):
        _call(PREDICTION, "predict_entry_point", arguments)


def _plan_and_preprocess(arguments: Sequence[str]) -> None:
    module = "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints"
    _call(module, "plan_and_preprocess_entry", arguments)


def _with_trainer(arguments: Sequence[str]) -> list[str]:
    """Whether one is named, argparse says, as it does to nnU-Net: it takes -tr NAME and -tr=NAME."""
    trainer = argparse.ArgumentParser(prog="effseg nnunet", add_help=False)
    trainer.add_argument("-tr")
    given, _ = trainer.parse_known_args([*arguments])
    return [*arguments] if given.tr is not None else [*arguments, "-tr", TRAINER]


def _call(module: str, name: str, arguments: Sequence[str]) -> None:
    """An entry point reads sys.argv."""
    entry = getattr(import_module(module), name)
    with _replaced(sys, "argv", [name, *arguments]):
        entry()


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


ACTIONS: dict[str, Callable[[Sequence[str]], None]] = {
    "plan_and_preprocess": _plan_and_preprocess,
    "train": _train,
    "predict": _predict,
}
