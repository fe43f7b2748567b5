"""torchrun's program: nnU-Net's loss and the fused one on a network under DDP, each process with its half.

Prints the largest difference of the gradients, relative to the largest gradient.
"""

import copy
import sys

import torch
import torch.distributed as dist
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import effseg
from effseg.nnunet.loss import fused


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.InstanceNorm3d(8), nn.LeakyReLU())
        self.heads = nn.ModuleList(nn.Conv3d(8, 3, 1) for _ in range(2))

    def forward(self, image):
        features = self.body(image)
        return [head(features) for head in self.heads]


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    network = TwoHeads()
    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": True}
    one = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
    loss = DeepSupervisionWrapper(one, (0.8, 0.2))
    torch.manual_seed(1 + dist.get_rank())
    image, labels = torch.randn(1, 1, 6, 7, 8), torch.randint(0, 3, (1, 1, 6, 7, 8))
    gradients = []
    for model, criterion in ((copy.deepcopy(network), loss), (effseg.convert(network), fused(loss))):
        wrapped = DistributedDataParallel(model)
        criterion(wrapped(image), [labels, labels]).backward()
        gradients.append([p.grad for p in model.parameters()])
    largest = max(g.abs().max() for g in gradients[0])
    off = max((a - b).abs().max() for a, b in zip(*gradients, strict=True)) / largest
    sys.stdout.write(f"off {float(off):.1e}\n")  # at once, or the processes' lines would mix
    sys.stdout.flush()
    dist.destroy_process_group()


main()
