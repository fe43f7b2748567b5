"""Networks made of random statements, as `effseg.convert` may meet them in other people's code.

A program is a list of (statement, i, j): every statement reads features i and j of those that there are,
counted round and round, and adds one. Features have `WIDTH` channels and one of two sizes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 4
FULL = (4, 6, 4)
HALF = (2, 3, 2)
Statement = Callable[[Any, int, Tensor, Tensor], Tensor]
STATEMENTS: dict[str, Statement] = {}
Program = list[tuple[str, int, int]]


NEEDED: dict[str, tuple[str, ...]] = {}
"""The modules that a statement uses, by its name."""


def statement(*needed: str) -> Callable[[Statement], Statement]:
    def register(function: Statement) -> Statement:
        STATEMENTS[function.__name__], NEEDED[function.__name__] = function, needed
        return function

    return register


class Network(nn.Module):
    """Runs a program; gives all features, and what was looked at on the way."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.door = nn.Conv3d(1, WIDTH, 3, padding=1)
        self.parts = nn.ModuleList(parts(name, at) for at, (name, _, _) in enumerate(program))
        self.seen: list[Any] = []

    def forward(self, image: Tensor) -> dict[str, Any]:
        self.seen = []
        features = [self.door(image)]
        for at, (name, i, j) in enumerate(self.program):
            a, b = features[i % len(features)], features[j % len(features)]
            features.append(STATEMENTS[name](self, at, a, b))
            self.seen.append(features[-1].requires_grad)
        return {"features": tuple(features), "seen": self.seen}


class Counted(nn.Module):
    """A block that changes a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv3d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm3d(WIDTH), nn.ReLU())
        self.second = nn.Sequential(nn.Conv3d(WIDTH, WIDTH, 3, padding=1), nn.InstanceNorm3d(WIDTH))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.second(self.first(x)) * self.calls


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


NORMS = (
    lambda: nn.InstanceNorm3d(WIDTH, affine=True),
    lambda: nn.BatchNorm3d(WIDTH),
    lambda: nn.GroupNorm(2, WIDTH),
    lambda: nn.InstanceNorm3d(WIDTH, track_running_stats=True),
)
ACTIVATIONS = (
    lambda: nn.LeakyReLU(0.1, inplace=True),
    lambda: nn.ReLU(inplace=True),
    nn.GELU,
    lambda: nn.LeakyReLU(0.01),
    lambda: nn.ELU(inplace=True),
    lambda: nn.PReLU(WIDTH),
    lambda: nn.SiLU(inplace=True),
    nn.ReLU,
    nn.ELU,
)
PARTS = {
    "conv": lambda at: nn.Conv3d(WIDTH, WIDTH, 3, padding=1, bias=at % 2 == 0),
    "norm": lambda at: NORMS[at % 4](),
    "act": lambda at: ACTIVATIONS[at % len(ACTIVATIONS)](),
    "unit": lambda at: nn.Sequential(
        nn.Conv3d(WIDTH, WIDTH, 3, padding=1), nn.InstanceNorm3d(WIDTH), nn.ReLU(True)
    ),
    "narrow": lambda at: nn.Conv3d(2 * WIDTH, WIDTH, 1),
    "down": lambda at: nn.Conv3d(WIDTH, WIDTH, 3, 2, 1),
    "up": lambda at: nn.ConvTranspose3d(WIDTH, WIDTH, 2, 2),
    "counted": lambda at: Counted(),
    "hooked": lambda at: nn.Sequential(nn.Conv3d(WIDTH, WIDTH, 1), nn.InstanceNorm3d(WIDTH)),
}


def parts(name: str, at: int) -> nn.Module:
    made = nn.Module()
    for part in NEEDED[name]:
        made.add_module(part, PARTS[part](at))
    return made


def like(a: Tensor, b: Tensor) -> Tensor:
    """b in the size of a."""
    if a.shape == b.shape:
        return b
    return F.max_pool3d(b, 2) if a.shape[2] < b.shape[2] else F.interpolate(b, scale_factor=2)


def is_full(x: Tensor) -> bool:
    return tuple(x.shape[2:]) == FULL


# ---------------------------------------------------------------- modules
@statement("conv")
def conv(net, at, a, b):
    return net.parts[at].conv(a)


@statement("norm")
def norm(net, at, a, b):
    return net.parts[at].norm(a)


@statement("act")
def act(net, at, a, b):
    return net.parts[at].act(a)


@statement("unit")
def unit(net, at, a, b):
    return net.parts[at].unit(a)


@statement("counted")
def block(net, at, a, b):
    return net.parts[at].counted(a)


@statement("down", "up")
def downsample(net, at, a, b):
    return net.parts[at].down(a) if is_full(a) else net.parts[at].up(a)


@statement()
def pool(net, at, a, b):
    return (
        (F.max_pool3d if at % 2 else F.avg_pool3d)(a, 2) if is_full(a) else F.interpolate(a, scale_factor=2)
    )


@statement("hooked")
def trilinear(net, at, a, b):
    if is_full(a):
        return F.max_pool3d(a, 3, 2, 1)
    return F.interpolate(net.parts[at].hooked[0](a), scale_factor=2, mode="trilinear", align_corners=False)


@statement()
def dropout(net, at, a, b):
    return F.dropout3d(a, 0.0, inplace=at % 2 == 0)


# ---------------------------------------------------------------- sums, copies, layouts
@statement()
def add(net, at, a, b):
    return a + like(a, b)


@statement("narrow")
def cat(net, at, a, b):
    return net.parts[at].narrow(torch.cat([a, like(a, b)], 1))


@statement()
def multiply(net, at, a, b):
    return a * torch.sigmoid(like(a, b))


@statement()
def gate(net, at, a, b):
    return a * torch.sigmoid(a.mean((2, 3, 4), keepdim=True))


@statement()
def halves(net, at, a, b):
    first, second = a.chunk(2, 1)
    return torch.cat([second, first], dim=1)


@statement()
def flat(net, at, a, b):
    return a.contiguous().view(a.shape[0], -1).tanh().view(a.shape)


@statement()
def turned(net, at, a, b):
    # Contiguous in the end: where a gradient comes in channels-last memory, stock torch's norms on a CPU pass
    # on a wrong one (finite differences say so).
    return a.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3).contiguous()


@statement()
def view(net, at, a, b):
    return a.view(a.shape) if at % 2 else a[:, :, :]


@statement()
def padded(net, at, a, b):
    return F.pad(a, [1, 0, 0, 0, 0, 2])[:, :, : a.shape[2], :, 1:]


@statement()
def reordered(net, at, a, b):
    return a[:, [1, 0, 3, 2]] if at % 2 else a.flip(2)


@statement()
def stacked(net, at, a, b):
    return torch.stack([a, like(a, b)]).sum(0)


@statement()
def copied(net, at, a, b):
    return torch.empty_like(a).copy_(a) if at % 2 else a.clone()


@statement()
def chosen(net, at, a, b):
    return torch.where(a > 0, a, like(a, b)) if at % 2 else a.masked_fill(like(a, b) > 0, 0.5)


# ---------------------------------------------------------------- in place
@statement()
def view_in_place(net, at, a, b):
    if at % 2:
        a[:, 1].mul_(2)
    else:
        a.flatten(2)[:, 2].add_(1)
    return a.clamp_(min=-5)


@statement("conv")
def changed_after_a_view(net, at, a, b):
    part = net.parts[at].conv(a)
    side = part[:, :2]
    part += 1
    return torch.cat([side, side * 2], 1)


@statement()
def add_in_place(net, at, a, b):
    a += like(a, b)
    return a


@statement()
def scale_in_place(net, at, a, b):
    return a.mul_(1.5) if at % 2 else a.add_(0.25)


@statement()
def activate_in_place(net, at, a, b):
    return F.leaky_relu_(a, 0.2) if at % 2 else F.relu(a, inplace=True)


@statement()
def set_in_place(net, at, a, b):
    a[:, 0] = like(a, b)[:, 1]
    return a


@statement()
def in_place_without_gradient(net, at, a, b):
    with torch.no_grad():
        a.mul_(0.5)
    return a + 0.1


# ---------------------------------------------------------------- gradient modes
@statement()
def data(net, at, a, b):
    net.seen.append(float(a.detach().numpy().sum()))
    return a.data * 0.5 + like(a, b)


@statement("unit")
def without_gradient(net, at, a, b):
    with torch.no_grad():
        part = net.parts[at].unit(a)
    return part + like(a, b)


@statement("unit")
def detached(net, at, a, b):  # not into a group norm: stock torch crashes there in channels-last memory
    return net.parts[at].unit(a.detach()) * like(a, b)


@statement("unit")
def looked_at(net, at, a, b):
    with torch.no_grad():
        net.seen.append(a.abs().mean().item())
    return net.parts[at].unit(a)


@statement("conv", "norm")
def looked_at_again(net, at, a, b):
    with torch.set_grad_enabled(False):
        found = net.parts[at].conv(a)
        with torch.enable_grad():
            other = net.parts[at].norm(like(found, b))
    return found + other


# ---------------------------------------------------------------- hooks
@statement("hooked")
def changed_by_hook(net, at, a, b):
    hooked = net.parts[at].hooked
    handle = hooked.register_forward_hook(lambda module, args, output: output * 2)
    found = hooked(a)
    handle.remove()
    return found


@statement("hooked")
def pre_hook(net, at, a, b):
    hooked = net.parts[at].hooked[1]
    handle = hooked.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    found = hooked(a)
    handle.remove()
    return found


@statement("unit")
def backward_hook(net, at, a, b):
    handle = (
        net.parts[at]
        .unit[0]
        .register_full_backward_hook(
            lambda module, into, outof: tuple(None if g is None else g * 2 for g in into)
        )
    )
    found = net.parts[at].unit(a)
    handle.remove()
    return found * 2


@statement("unit")
def kept_by_hook(net, at, a, b):
    kept = []
    handle = net.parts[at].unit[1].register_forward_hook(lambda module, args, output: kept.append(output))
    found = net.parts[at].unit(a)
    handle.remove()
    return found + kept[0].cos()


@statement("conv")
def gradient_hook(net, at, a, b):
    found = net.parts[at].conv(a)
    if found.requires_grad:
        found.register_hook(lambda grad: grad * 3)
    return found.sin()


# ---------------------------------------------------------------- recomputation and functions of one's own
@statement("unit")
def checkpointed(net, at, a, b):
    return checkpoint(net.parts[at].unit, a, use_reentrant=False)


@statement("hooked")
def checkpointed_norm(net, at, a, b):
    return checkpoint(lambda x: net.parts[at].hooked[1](x) + like(x, b), a, use_reentrant=False)


@statement("unit")
def checkpointed_reentrant(net, at, a, b):
    return checkpoint(net.parts[at].unit, a, use_reentrant=True) if a.requires_grad else a


@statement("unit", "norm")
def checkpointed_twice(net, at, a, b):
    def inner(x):
        return net.parts[at].norm(x) * like(x, b)

    return checkpoint(
        lambda x: checkpoint(inner, net.parts[at].unit(x), use_reentrant=False), a, use_reentrant=False
    )


@statement()
def function(net, at, a, b):
    return Doubled.apply(a)
