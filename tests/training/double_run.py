"""A training run in float64, as a program: where two ways of computing the same must agree closely.

Usage: python double_run.py CONFIG.json, also under torchrun.
"""

import json
import sys
from pathlib import Path

import effseg.training.loop as loop
from effseg.models.registry import build_model
from effseg.training import TrainingConfig, train


def main() -> None:
    loop.build_model = lambda *arguments: build_model(*arguments).double()
    train(TrainingConfig.from_dict(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
