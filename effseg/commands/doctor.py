"""`effseg doctor`: is this installation sound?"""

import argparse
import json

from effseg.doctor import diagnose

HELP = """Check versions, the GPU, known faults of torch with cuDNN, and the arithmetic: a network's loss and
gradients against the same in stock torch. Exit code 0 if nothing is at fault, 1 otherwise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    found = diagnose()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        for name, version in found["versions"].items():
            print(f"{name:<14}{version or '-'}")
        print()
        for check in found["checks"]:
            print(f"{check['state']:<9}{check['name']}: {check['detail']}")
    return 0 if found["ok"] else 1
