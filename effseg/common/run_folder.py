"""What a training run writes to its folder, by name."""

from pathlib import Path

# All that a run writes, beside prepared volumes in cache/, which serve any run; nothing else is ever touched.
FILES = ("config.json", "data.json", "progress.csv", "curves.png", "best.safetensors", "final.safetensors")
FOLDERS = ("checkpoints", "tensorboard", "overlays")
WEIGHTS = ("best.safetensors", "final.safetensors")
LOCK = ".lock"  # empty, and left behind: whoever deletes it could let two processes in


def holds_run(folder: Path) -> bool:
    """Whether a run has left anything there."""
    # data.json alone is no run: it is written just before config.json, which makes the folder one.
    return any((folder / name).exists() for name in FILES + FOLDERS if name != "data.json")


def has_begun(folder: Path) -> bool:
    """Whether a run trains there, or has: its lock, data or checkpoints, which copied weights lack."""
    return any((folder / name).exists() for name in (LOCK, "data.json", "checkpoints"))
