"""Configurations of kernels by measurement."""
