"""Weights to begin a training with, from another training or from Python."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from effseg.errors import InputError
from effseg.inference.weights import weights_file
from effseg.models.base import SegmentationModel
from effseg.models.registry import load
from effseg.training.checkpoint import Checkpoints

_NAMES = ("best.safetensors", "final.safetensors")

_SHAPES = {"in_channels", "num_classes"}
"""Arguments of a network that its tensors' shapes tell."""


def initial_weights(given: Path) -> Path:
    """The file that `given`, a .safetensors file or a run's folder, stands for: the run's best network, else
    its final one, else that of its newest checkpoint. Raises InputError where there is none."""
    newest = Checkpoints(given / "checkpoints").newest()
    if newest is None or any((given / name).is_file() for name in _NAMES):
        return weights_file(given)
    return newest / "model.safetensors"


def describe_file(path: Path) -> dict[str, str]:
    """Path and checksum, as a run records them."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"path": str(path.absolute()), "sha256": digest.hexdigest()}


def check_same_weights(given: Path, recorded: Mapping[str, str] | None, folder: Path) -> None:
    """Raise InputError where the run in `folder` began with other weights than `given`."""
    if recorded is None:
        raise InputError(
            f"{folder} holds a run that began without --init, but now it is {given}: use another output"
        )
    if Path(recorded["path"]) in (given.absolute(), *(given.absolute() / name for name in _NAMES)):
        return
    file = initial_weights(given)
    if describe_file(file)["sha256"] != recorded["sha256"]:
        raise InputError(
            f"{folder} holds a run that began with {recorded['path']}, but now it is {file}: "
            "use another output, or overwrite the run"
        )


def take_weights(model: SegmentationModel, file: Path, names: tuple[str, ...]) -> str:
    """Put the weights in `file` into `model`, whose classes are `names`, and return what was done, in words.

    Tensors that belong to the classes (the head) keep what `model` has where their number differs.
    Raises InputError where the file is of another network, or of one with another norm.
    """
    source = load(file)
    _check_same_function(model, source, file)
    own, theirs = model.state_dict(), source.state_dict()
    classes, before = model.arguments["num_classes"], source.arguments["num_classes"]
    anew = [key for key, tensor in own.items() if tensor.shape != theirs[key].shape]
    for key in anew:
        of_classes = (own[key].shape[0], theirs[key].shape[0]) == (classes, before)
        if not of_classes or own[key].shape[1:] != theirs[key].shape[1:]:
            expected, got = tuple(own[key].shape), tuple(theirs[key].shape)
            raise InputError(
                f"init: {file}: expected weights of {model.name} with {model.arguments['in_channels']} "
                f"channels, got {key} of shape {got}, not {expected}"
            )
    model.load_state_dict({key: tensor if key in anew else theirs[key] for key, tensor in own.items()})
    said = f"begins with the weights of {file}"
    if anew:
        return f"{said}; the head is made anew for {classes} classes, it had {before}"
    known = source.extra.get("labels")
    known = known.get("names") if isinstance(known, dict) else None
    if isinstance(known, list) and tuple(known) != names:
        return f"{said}; its classes were {', '.join(map(str, known))}, now they are {', '.join(names)}"
    return said


def _check_same_function(model: SegmentationModel, source: SegmentationModel, file: Path) -> None:
    """Raise InputError unless weights mean in `model` what they did in `source`, that of `file`: keys and
    shapes alone do not tell, group norm's are those of instance norm."""
    own, theirs = model.arguments, source.arguments
    different = [key for key in {**own, **theirs} if own.get(key) != theirs.get(key)]
    telling = [key for key in different if key not in _SHAPES | model.ways]
    same_keys = model.state_dict().keys() == source.state_dict().keys()
    if model.name == source.name and not telling and same_keys:
        return
    kinds = [network.name for network in (model, source)]
    if model.name == source.name:
        told = [
            ", ".join(f"{key} = {arguments.get(key)}" for key in telling or different)
            for arguments in (own, theirs)
        ]
        kinds = [f"{kind} with {what}" for kind, what in zip(kinds, told, strict=True)]
    raise InputError(f"init: {file}: expected weights of {kinds[0]}, got those of {kinds[1]}")
