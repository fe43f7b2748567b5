"""A training run in float64, as a program: where two ways of computing the same must agree closely.

Usage: python double_run.py CONFIG.json [STEP at which the process ends at once], also under torchrun.
"""

import json
import os
import sys
from pathlib import Path

import effseg.training.loop as loop
from effseg.training import TrainingConfig, train
from effseg.training.optimizer import Stepper


def main() -> None:
    build, step = loop._network, Stepper.__call__
    last = int(sys.argv[2]) if len(sys.argv) > 2 else None

    def stepped(self, number, *arguments):
        if number + 1 == last:
            os._exit(1)
        return step(self, number, *arguments)

    loop._network = lambda *arguments: build(*arguments).double()
    Stepper.__call__ = stepped
    train(TrainingConfig.from_dict(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
