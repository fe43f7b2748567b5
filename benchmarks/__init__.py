"""Maintainers' tools, run from a checkout; nothing of them is in the wheel."""
