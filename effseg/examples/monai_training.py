"""MONAI's BasicUNet, transforms and engine, with a converted network and a loss that makes no logits.

Two lines differ from a program without effseg: the ones with `effseg.convert` and `effseg.SegmentationLoss`.
Trains on six phantoms for less than a minute on a CPU, half of the steps in a plain loop, half of them in
MONAI's SupervisedTrainer (which needs pytorch-ignite), and prints the Dice on a phantom it has not seen.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from monai.data import DataLoader, Dataset
from monai.metrics import DiceMetric
from monai.networks.nets import BasicUNet
from monai.networks.utils import one_hot
from monai.transforms import (
    Compose,
    EnsureTyped,
    RandGaussianNoised,
    RandScaleIntensityd,
    ScaleIntensityRanged,
)
from torch import nn

import effseg
from effseg.phantom import NAMES, generate

SHAPE = (48, 32, 48)
CASES = 6
EPOCHS = 10  # in the plain loop, and again in the engine
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    torch.manual_seed(0)
    classes = len(NAMES)
    network = BasicUNet(3, 1, classes, features=(16, 16, 32, 64, 64, 16)).to(DEVICE)
    network = effseg.convert(network, memory="raw")  # or "block", "stream", "auto"
    print(str(network.conversion_report).splitlines()[0])  # the whole of it tells of every module
    criterion = effseg.SegmentationLoss(batch_dice=True)
    optimizer = torch.optim.AdamW(network.parameters(), 4e-3)

    unseen = next(iter(loader([100], augment=False)))
    print(f"mean Dice before: {mean_dice(network, unseen):.3f}")
    training = loader(range(CASES), augment=True)
    train_in_a_loop(network, criterion, optimizer, training)
    print(f"after {EPOCHS} epochs of a plain loop: {mean_dice(network, unseen):.3f}")
    if find_spec("ignite") is None:
        print("SupervisedTrainer needs pytorch-ignite (pip install pytorch-ignite): a plain loop instead")
        train_in_a_loop(network, criterion, optimizer, training)
    else:
        train_in_an_engine(network, criterion, optimizer, training)
    print(f"after {EPOCHS} more: {mean_dice(network, unseen):.3f}")


def loader(seeds: range | list[int], augment: bool) -> DataLoader:
    """Phantoms (N, 1, D, H, W) in HU, scaled, and labels (N, 1, D, H, W).

    `track_meta=False`: a network gets tensors, not MONAI's MetaTensors.
    """
    volumes = [map(torch.from_numpy, generate(SHAPE, seed)) for seed in seeds]
    cases = [{"image": image[None], "label": label[None]} for image, label in volumes]
    changes = (
        [RandScaleIntensityd("image", 0.1, prob=0.5), RandGaussianNoised("image", prob=0.3, std=0.05)]
        if augment
        else []
    )
    transforms = Compose(
        [
            ScaleIntensityRanged("image", -200, 400, -1, 1, clip=True),
            *changes,
            EnsureTyped(("image", "label"), dtype=(torch.float32, torch.uint8), track_meta=False),
        ]
    )
    return DataLoader(Dataset(cases, transforms), shuffle=augment)


def train_in_a_loop(
    network: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, data: DataLoader
) -> None:
    network.train()
    for _ in range(EPOCHS):
        for batch in data:
            optimizer.zero_grad()
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
                loss = criterion(network(batch["image"].to(DEVICE)), batch["label"].to(DEVICE))
            loss.backward()
            optimizer.step()


def train_in_an_engine(
    network: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, data: DataLoader
) -> None:
    from monai.engines import SupervisedTrainer

    SupervisedTrainer(DEVICE, EPOCHS, data, network, optimizer, criterion, amp=DEVICE.type == "cuda").run()


@torch.no_grad()
def mean_dice(network: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """In evaluation a converted network returns ordinary logits, for whatever MONAI does with them."""
    classes = network.eval()(batch["image"].to(DEVICE)).argmax(1, keepdim=True)
    metric = DiceMetric(include_background=False, ignore_empty=True)
    metric(one_hot(classes, len(NAMES)), one_hot(batch["label"].to(DEVICE), len(NAMES)))
    return float(metric.aggregate())


if __name__ == "__main__":
    main()
