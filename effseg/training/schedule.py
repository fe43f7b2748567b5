"""The learning rate as a pure function of the step."""

import math

WARMUP_START = 0.05  # of the peak rate, at step 0
FINAL = 1e-3  # of the peak rate, at the last step


def learning_rate(step: int, steps: int, peak: float, warmup: float = 0.08) -> float:
    """The rate of optimiser step `step` (0 to `steps` - 1).

    Linear from 5 % of `peak` over the first `warmup` share of the steps, then a half cosine to 0.1 %.
    """
    progress = step / steps
    if progress < warmup:
        return peak * (WARMUP_START + (1 - WARMUP_START) * progress / warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    return peak * max(FINAL, cosine)
