"""Programs to read, to run and to copy from: `python -m effseg.examples.monai_training`."""
