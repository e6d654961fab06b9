"""FP4 weights (float4_e2m1fn, two in a byte) in small groups: NVFP4 and MXFP4.

NVFP4 has groups of 16 with a float8_e4m3fn scale, and a float32 factor for the whole matrix; MXFP4 groups
of 32 with a power of two (float8_e8m0fnu). Sources: the OCP's MX specification, NVIDIA ModelOpt,
compressed-tensors.
"""

from __future__ import annotations

import numpy as np
from qwen_common.errors import UserError

from qwen_export.checkpoint.forms.scaled import E2M1_VALUES, ScaledTensor
from qwen_export.checkpoint.forms.scales import E4M3, E8M0, Scales
from qwen_export.checkpoint.tensors.plain import PlainTensor

_UINT8 = np.dtype(np.uint8)
# By group: its name, and what a byte of a scale may be, where the dtype does not say so.
_KINDS = {16: ("NVFP4", E4M3), 32: ("MXFP4", E8M0)}


def fp4_tensor(
    codes: PlainTensor,
    scales: PlainTensor,
    group: int,
    whole: PlainTensor | None = None,
    divides: bool = False,
) -> ScaledTensor:
    """[N, K] from uint8 [N, K / 2], or experts' [E, N, K].

    Args:
        scales: [N, K / group].
        whole: the factor of the whole matrix, or of each expert's.
        divides: it divides the scales.

    Raises:
        UserError: they do not belong together.
    """
    name, kind = _KINDS.get(group, ("", E4M3))
    *rows, half = codes.shape if len(codes.shape) in (2, 3) else (0, 0)
    fits = bool(name) and codes.dtype == _UINT8 and 0 not in codes.shape and 2 * half % group == 0
    fits = fits and scales.dtype in (kind, _UINT8) and scales.shape == (*rows, 2 * half // group)
    factor = whole.reshaped((1,) if len(rows) == 1 else (rows[0],)) if whole else None
    if not fits or (whole and (factor is None or whole.dtype != np.float32)):
        parts = ", ".join(
            f"{part.name} ({part.dtype} {part.shape})" for part in (codes, scales, whole) if part
        )
        raise UserError(f"{parts} are no 4-bit floats and scales for groups of {group}: download them again")
    return ScaledTensor(
        name, codes, Scales(scales, kind=kind, whole=factor, divides=divides), group, E2M1_VALUES
    )
