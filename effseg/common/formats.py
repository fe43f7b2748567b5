"""Number formats and memory layout that every level agrees on."""

import torch

CHANNELS_LAST = torch.channels_last_3d
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Those that a GPU computes in, by the names that commands, records and tuned files give them."""


def dtype_name(dtype: torch.dtype) -> str:
    """As torch writes it, "float32"."""
    return str(dtype).removeprefix("torch.")


def label_dtype(classes: int) -> torch.dtype:
    """The smallest of the two types of label volumes that holds so many classes."""
    return torch.uint8 if classes <= 256 else torch.int16


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
