"""Prediction with trained nnU-Net models: nnU-Net's labels, a slab of logits at a time."""
