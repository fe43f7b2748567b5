"""Tensors of a device in the host's memory, of which the device sees a slab at a time."""
