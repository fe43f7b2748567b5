"""What autograd keeps between forward and backward."""

import torch


def bytes_kept_for_backward(model, image, labels, autocast):
    """Bytes of every storage that the loss's graph keeps, parameters aside, counted once."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), t)  # alive, so that no address is used twice
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model.loss(image, labels)
    return sum(n for n, _ in kept.values())
