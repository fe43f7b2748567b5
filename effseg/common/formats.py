"""Number formats and memory layout that every level agrees on."""

import torch

CHANNELS_LAST = torch.channels_last_3d


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
