"""4-bit floats in small blocks, as checkpoints have them and the CPU's QMoE reads them: NVFP4 and MXFP4.

float4_e2m1fn codes, two in a byte, the first in its lower half. NVFP4 has blocks of 16 with a scale in
float8_e4m3fn, and a float32 factor for the whole matrix; MXFP4 blocks of 32 with a power of two
(float8_e8m0fnu). Sources: the OCP's MX specification, NVIDIA ModelOpt, com.microsoft::QMoE.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

# 0, 0.5, 1, 1.5, 2, 3, 4, 6, and the same below zero.
E2M1_VALUES = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)


@dataclass(frozen=True)
class Fp4:
    """One of the two.

    Attributes:
        name: in words for a message.
        quant_type: QMoE's attribute.
        block_size: input features that share a scale.
        scale_dtype: of a block's scale.
    """

    name: str
    quant_type: str
    block_size: int
    scale_dtype: np.dtype


NVFP4 = Fp4("NVFP4", "nvfp4", 16, np.dtype(ml_dtypes.float8_e4m3fn))
MXFP4 = Fp4("MXFP4", "fp4", 32, np.dtype(ml_dtypes.float8_e8m0fnu))
FP4_FORMS = {form.block_size: form for form in (NVFP4, MXFP4)}


def unpack(octets: np.ndarray) -> np.ndarray:
    """uint8 [..., bytes] -> codes [..., 2 bytes]."""
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(*octets.shape[:-1], -1)


def dequantize_fp4(codes: np.ndarray, scales: np.ndarray, factors: np.ndarray, form: Fp4) -> np.ndarray:
    """float32 [E, N, K] of experts' packed codes [E, N, K / 2], scales [E, N, blocks] and factors [E]."""
    values = E2M1_VALUES[unpack(codes)]
    wide = scales.astype(np.float32) * factors[:, None, None]
    return values * np.repeat(wide, form.block_size, axis=-1)
