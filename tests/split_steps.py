"""A training step and a segmentation of one volume, in one process and split across several."""

import threading
from contextlib import nullcontext
from typing import NamedTuple

import torch

from effseg import parallel
from effseg.models.effsegnet import EffSegNet

CLASSES = 5


class Case(NamedTuple):
    """options: of EffSegNet; loss: of `EffSegNet.loss`."""

    shape: tuple
    options: dict = {}  # noqa: RUF012
    loss: dict = {}  # noqa: RUF012
    samples: int = 1


class Found(NamedTuple):
    loss: float
    gradients: list
    labels: torch.Tensor
    buffers: list


_seeded = threading.Lock()  # torch's generator is one for all threads


def network(case):
    with _seeded:
        return _network(case)


def _network(case):
    torch.manual_seed(0)
    model = EffSegNet(1, CLASSES, **case.options).double()
    for module in model.modules():
        if type(module) in (torch.nn.InstanceNorm3d, torch.nn.BatchNorm3d, torch.nn.GroupNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def batch(case):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(case.samples, 1, *case.shape, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, CLASSES, (case.samples, *case.shape), generator=generator)
    return image, labels


def step(case, rows=slice(None), around=nullcontext):
    """Loss, gradients, labels and buffers of a step on rows of a volume. Backward runs outside `around`."""
    model, (image, labels) = network(case), batch(case)
    image, labels = image[:, :, rows], labels[:, rows]
    options = dict(case.loss)
    if "class_weights" in options:
        options["class_weights"] = torch.tensor(options["class_weights"], dtype=torch.float64)
    with around():
        loss = model.loss(image, labels, **options)
    loss.backward()
    model.eval()
    with around():
        found = model.segment(image)
    gradients = [p.grad for p in model.parameters()]
    return Found(loss.item(), gradients, found, [b.clone() for b in model.buffers()])


def on_gloo(case):
    """What a process of a group does with its rows."""
    mesh = parallel.mesh(volume=torch.distributed.get_world_size())
    return step(case, parallel.rows(case.shape, mesh), lambda: parallel.split(mesh))


def largest_error(found, expected):
    """Of loss, gradients and buffers of several processes; a reducer averages gradients."""
    errors = [abs(one.loss - expected.loss) for one in found]
    for i, wanted in enumerate(expected.gradients):
        mean = sum(one.gradients[i] for one in found) / len(found)
        scale = max(float(wanted.abs().max()), 1e-6)
        errors.append(float((mean - wanted).abs().max()) / scale)
    for one in found:
        errors += [float((a - b).abs().max()) for a, b in zip(one.buffers, expected.buffers, strict=True)]
    return max(errors)
