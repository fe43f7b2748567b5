"""Model folders of nnU-Net v2."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import effseg
from effseg.errors import InputError
from effseg.nnunet.prediction.checkpoint import Checkpoint, read_checkpoint
from effseg.nnunet.prediction.export import check_resampling
from effseg.nnunet.prediction.trainers import build_network

Folds = Sequence[int | str]
PREPROCESSOR = "DefaultPreprocessor"


@dataclass(frozen=True, eq=False)
class Model:
    """A trained configuration: one network a fold, in evaluation mode.

    plans, configuration, labels: nnU-Net's managers; dataset: dataset.json; mirror_axes: see `Checkpoint`.
    folds: the networks', numbers or "all".
    """

    networks: list[nn.Module]
    plans: Any
    configuration: Any
    labels: Any
    dataset: dict[str, Any]
    mirror_axes: tuple[int, ...]
    folds: Folds

    @property
    def classes(self) -> int:
        """Number of the networks' output channels: labels, or regions without the background."""
        return int(self.labels.num_segmentation_heads)

    @property
    def previous(self) -> tuple[int, ...]:
        """Of a cascade's second stage the labels of the first one that it is shown, else none."""
        if self.configuration.previous_stage_name is None:
            return ()
        return tuple(int(label) for label in self.labels.foreground_labels)


def load_model(
    folder: Path, folds: Folds | None, checkpoint: str, device: torch.device, converted: bool = True
) -> Model:
    """From TRAINER__PLANS__CONFIGURATION with plans.json, dataset.json and fold_N/`checkpoint`.

    folds: numbers or "all"; None: every numbered fold, each of which must have the checkpoint. converted: run
    3D networks on this package's operators where they can be taken over.
    Raises InputError, in one line, where something is missing, unsafe, or not supported.
    """
    try:
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    except ModuleNotFoundError as error:
        raise InputError("nnU-Net is not installed: pip install nnunetv2") from error

    plans, dataset = PlansManager(_json(folder / "plans.json")), _json(folder / "dataset.json")
    chosen = _folds(folder, folds, checkpoint)
    found = [read_checkpoint(folder / f"fold_{fold}" / checkpoint) for fold in chosen]
    first = found[0]
    try:
        configuration = plans.get_configuration(first.configuration)
        labels = plans.get_label_manager(dataset)
        _check(configuration)
        channels = len(dataset.get("modality") or dataset["channel_names"])
        if configuration.previous_stage_name is not None:
            channels += len(labels.foreground_labels)
        network = build_network(
            first.trainer, plans, configuration, channels, int(labels.num_segmentation_heads)
        )
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    except (KeyError, RuntimeError, AssertionError, ValueError, ImportError) as error:
        raise InputError(f"{folder}: not a model that nnU-Net can use: {_line(error)}") from error
    networks = [_with_weights(network, one, folder) for one in found]
    flat = len(configuration.patch_size) == 2
    if converted and not flat:
        shape = (1, channels, *configuration.patch_size)
        networks = [effseg.convert(one, shape=shape, strict=False) for one in networks]
    networks = [one.to(device).eval() for one in networks]
    axes = _mirror_axes(first, flat, folder)
    return Model(networks, plans, configuration, labels, dataset, axes, chosen)


def _folds(folder: Path, folds: Folds | None, checkpoint: str) -> Folds:
    if folds is not None:
        if not folds:
            raise InputError("folds: expected at least one, got none")
        return folds
    found = sorted(
        int(path.parent.name[5:])
        for path in folder.glob(f"fold_*/{checkpoint}")
        if path.parent.name[5:].isdecimal()
    )
    others = sorted(
        path.name
        for path in folder.glob("fold_*")
        if path.is_dir() and path.name[5:].isdecimal() and int(path.name[5:]) not in found
    )
    if found and others:
        raise InputError(
            f"{folder}: no {checkpoint} in {', '.join(others)}: name the folds to use, -f "
            f"{' '.join(map(str, found))}, or wait until all are trained"
        )
    if not found:
        hint = ", but fold_all: name it, all" if (folder / "fold_all" / checkpoint).is_file() else ""
        raise InputError(f"{folder}: no fold_N with a {checkpoint}{hint}")
    return found


def _check(configuration: Any) -> None:
    entries = configuration.configuration
    if entries["preprocessor_name"] != PREPROCESSOR:
        raise InputError(f"preprocessor_name: expected {PREPROCESSOR}, got {entries['preprocessor_name']!r}")
    check_resampling(configuration)


def _with_weights(network: nn.Module, checkpoint: Checkpoint, folder: Path) -> nn.Module:
    own = copy.deepcopy(network)
    try:
        own.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        raise InputError(f"{folder}: the weights do not fit the plans' network: {_line(error)}") from None
    return own


def _mirror_axes(checkpoint: Checkpoint, flat: bool, folder: Path) -> tuple[int, ...]:
    last = 1 if flat else 2
    if any(not 0 <= axis <= last for axis in checkpoint.mirror_axes):
        raise InputError(
            f"{folder}: inference_allowed_mirroring_axes: expected 0 to {last}, got {checkpoint.mirror_axes}"
        )
    return checkpoint.mirror_axes


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: expected a model folder of nnU-Net v2") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: expected JSON: {_line(error)}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
