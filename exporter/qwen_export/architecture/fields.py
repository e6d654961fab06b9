"""The kinds of numbers in config.json: in JSON's own types, and of a size that a model can have.

Nothing is converted: "32" is no number, true is no 1. Without an upper limit one digit too many would cost
all memory before the first tensor is looked for.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import AfterValidator, Field, Strict

_MOST = 1 << 20
_MOST_LAYERS = 4096
_MOST_POSITIONS = (1 << 31) - 1
_LARGEST = float(np.finfo(np.float32).max)


def _float32(value: float) -> float:
    if not abs(value) <= _LARGEST:  # NaN, too
        raise ValueError(f"{value} is not a finite float32")
    return value


Size = Annotated[int, Strict(), Field(gt=0, le=_MOST)]  # of an axis, or how many of something
Taps = Annotated[int, Strict(), Field(gt=1, le=_MOST)]  # of a causal convolution
Layers = Annotated[int, Strict(), Field(gt=0, le=_MOST_LAYERS)]
Positions = Annotated[int, Strict(), Field(gt=0, le=_MOST_POSITIONS)]
Real = Annotated[float, Strict(), AfterValidator(_float32)]
Flag = Annotated[bool, Strict()]
TokenId = Annotated[int, Strict(), Field(ge=0, le=_MOST)]
