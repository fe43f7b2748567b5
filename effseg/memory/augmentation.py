"""What augmenting a batch on the device takes, beside the step that follows."""

import numpy as np
import torch

from effseg.data.device_augmentation import Changes, change
from effseg.memory.tracker import LiveStorages

# All that can be drawn; which rotation and how much of what makes no difference.
EVERYTHING = Changes(matrix=np.eye(4), factor=1.1, offset=0.1, noise=0.05, mirrored=((1, 2),))


def augment_batch(tracker: LiveStorages, image: torch.Tensor, labels: torch.Tensor) -> None:
    """Let `tracker` see every volume of a batch being augmented, and the results being put together.

    image (N, C, D, H, W), labels (N, D, H, W): fake, and already counted; as many bytes stay when this
    returns. Patches are augmented with their surroundings, of which this knows nothing.
    """
    with tracker:
        tracker.start_phase("augmentation")
        done = [change(x.float(), y, EVERYTHING, 0) for x, y in zip(image, labels, strict=True)]
        if len(done) > 1:
            torch.stack([x for x, _ in done]), torch.stack([y for _, y in done])
