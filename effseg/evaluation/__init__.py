"""Scores of predicted label files against true ones."""
