"""Deferred expressions: tensors that are never stored, and the slabs in which they are made."""
