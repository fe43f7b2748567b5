"""A model of a GPU step, on paper: `python -m benchmarks.step_model`. No GPU has run what it says."""
