"""Which network a trainer of nnU-Net's, or of this package's, has trained."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from effseg.errors import InputError

PATCHES, WHOLE_VOLUMES = "nnUNetTrainerEffSeg", "nnUNetTrainerEffSegFull"
NETWORKS, PARTS = "dynamic_network_architectures.", ("torch.nn.", "dynamic_network_architectures.")


def build_network(trainer: str, plans: Any, configuration: Any, channels: int, classes: int) -> nn.Module:
    """The network of a model folder, with random weights. plans, configuration: nnU-Net's managers.

    Raises InputError for a trainer that is neither nnU-Net's own nor this package's, for a network of whole
    volumes, and for plans that name code from elsewhere.
    """
    if trainer == WHOLE_VOLUMES:
        raise InputError(
            f"{trainer}: trained on whole volumes, not windows: predict with -d, -c and -tr {trainer}"
        )
    _check_names(configuration)
    found = _stock_trainer("nnUNetTrainer" if trainer == PATCHES else trainer)
    network: nn.Module = found.build_network_architecture(
        plans, configuration, channels, classes, enable_deep_supervision=False
    )
    return network


def knows(trainer: str) -> bool:
    """Whether `build_network` can tell which network this trainer has trained."""
    return trainer == PATCHES or _module_of(trainer) is not None


def _stock_trainer(name: str) -> Any:
    module = _module_of(name)
    if module is None:
        raise InputError(
            f"trainer_name: expected one of nnU-Net's own or {PATCHES}, got {name!r}: its network may be any"
        )
    return getattr(import_module(module), name)


def _module_of(name: str) -> str | None:
    """Where nnU-Net defines a class of trainers. Found by its text: to import them all, packages are needed
    that may be missing."""
    import nnunetv2

    package = Path(nnunetv2.__path__[0])
    defined = re.compile(rf"^class {re.escape(name)}\b", re.MULTILINE)
    for file in sorted((package / "training" / "nnUNetTrainer").rglob("*.py")):
        if defined.search(file.read_text(encoding="utf-8")):
            return ".".join(("nnunetv2", *file.relative_to(package).with_suffix("").parts))
    return None


def _check_names(configuration: Any) -> None:
    """nnU-Net imports what the plans name; here that is a network and layers of the packages that they come
    from in nnU-Net's own plans."""
    arguments = configuration.network_arch_init_kwargs
    parts = [arguments[key] for key in configuration.network_arch_init_kwargs_req_import]
    name = configuration.network_arch_class_name
    if not name.startswith(NETWORKS):
        raise InputError(f"network_class_name: expected one of {NETWORKS[:-1]}, got {name!r}")
    for part in parts:
        if part is not None and not str(part).startswith(PARTS):
            raise InputError(f"arch_kwargs: expected parts of {' or '.join(PARTS)}, got {part!r}")
