"""What is no tensor, as an operator's arguments: text for the structure, whole numbers beside it.

    Raw((2, 16, 8, 8, 8), torch.float32, 0.01, False)  <->  "Raw((_,_,_,_,_,),float32,0.01,False)", [2, 16,
    8, 8, 8]

Sizes may be symbols, so that one compiled function serves volumes of many sizes; text would tie it to one.
The text names content and refers to nothing in this process: compiled code may be cached and run in another.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch

from effseg.common.formats import dtype_name
from effseg.expressions.layers import Conv, Plain, Raw, Residual, UpAdd
from effseg.expressions.slabs import Window
from effseg.operators.normalisation import Merging

CLASSES = {c.__name__: c for c in (Conv, Merging, Plain, Raw, Residual, UpAdd, Window)}
NUMBER = "_"


def encode(*values: Any) -> tuple[str, list[int]]:
    """Text and numbers for `decode`: dataclasses of `CLASSES`, tuples, dtypes, numbers, texts, bools, None.

    Dynamo traces this: `isinstance(value, int)` holds for its symbols.
    """
    numbers: list[int] = []
    return _text(values, numbers), numbers


def _text(value: Any, numbers: list[int]) -> str:
    if value is None or isinstance(value, bool | float | str):
        return repr(value)
    if isinstance(value, int):
        numbers.append(value)
        return NUMBER
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, tuple):
        return "(" + "".join([_text(v, numbers) + "," for v in value]) + ")"
    fields = [_text(getattr(value, name), numbers) for name in type(value).__match_args__]
    return f"{type(value).__name__}({','.join(fields)})"


def decode(text: str, numbers: Sequence[int]) -> Any:
    """The tuple that was encoded. Raises `ValueError` for text that `encode` does not write."""
    return _value(_parsed(text), iter(numbers))


@lru_cache(maxsize=1024)
def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _value(node: ast.expr, numbers: Iterator[int]) -> Any:
    match node:
        case ast.Constant(value):
            return value
        case ast.Tuple(elements):
            return tuple([_value(e, numbers) for e in elements])
        case ast.Name(name) if name == NUMBER:
            return next(numbers)
        case ast.Name(name) if isinstance(getattr(torch, name, None), torch.dtype | float):  # inf is one
            return getattr(torch, name)
        case ast.Call(ast.Name(name), arguments) if name in CLASSES:
            return CLASSES[name](*[_value(a, numbers) for a in arguments])
    raise ValueError(f"text: expected what encode writes, got {ast.unparse(node)}")
