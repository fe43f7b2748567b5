"""Segmentation networks of this package."""
