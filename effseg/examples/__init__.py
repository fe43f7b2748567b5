"""Programs to read, to run and to copy from, as in `python -m effseg.examples.whole_ct`.

whole_ct: NIfTI files, training, a checkpoint and labels, in Python. monai_training: MONAI's
network, transforms and engine. nnunet_training: nnU-Net's commands. planning_memory: what fits on
a card.
"""
