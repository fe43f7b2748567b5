"""Faults that a comparison must see: a thousandth too much in a tap or at a voxel of a border, a lost row."""

import torch

BY = 1.001


def tap(weight):
    """One tap of a kernel, (Co, Ci, kd, kh, kw)."""
    weight[..., 0, -1, 0] *= BY


def weight(weight):
    """One of all weights, one that matters."""
    weight.view(-1)[weight.abs().argmax()] *= BY


def border(values):
    """One channel of one voxel on an edge of (N, C, D, H, W); in a narrow type by one last place."""
    edge = values[0, :, 0, 0]
    channel, place = divmod(int(edge.abs().argmax()), edge.shape[1])
    edge[channel, place] *= max(BY, 1 + torch.finfo(values.dtype).eps)


def row(values):
    """The first row is lost."""
    values[:, :, 0] = 0


def one(values):
    """One of several sums."""
    values.view(-1)[values.abs().argmax()] *= BY


def before(function, position, fault):
    """The function, given an argument, by its number or name, with a fault."""

    def wrong(*args, **options):
        args = list(args)
        given = options if isinstance(position, str) else args
        given[position] = given[position].clone()
        fault(given[position])
        return function(*args, **options)

    return wrong


def after(function, position, fault):
    """The function, leaving a fault in an argument that it writes."""

    def wrong(*args, **options):
        found = function(*args, **options)
        fault(args[position])
        return found

    return wrong


def result(function, fault, position=None):
    """The function, giving a fault, in one of the tensors that it gives if there are several."""

    def wrong(*args, **options):
        found = function(*args, **options)
        fault(found if position is None else found[position])
        return found

    return wrong
