"""FP4 weights as checkpoints have them: NVFP4 and MXFP4. Source: NVIDIA ModelOpt, compressed-tensors."""

from __future__ import annotations

import numpy as np
from qwen_common.errors import UserError

from qwen_export.checkpoint.forms.scaled import ScaledTensor
from qwen_export.checkpoint.forms.scales import Scales
from qwen_export.checkpoint.tensors.plain import PlainTensor
from qwen_export.quantize.fp4 import E2M1_VALUES, FP4_FORMS

_UINT8 = np.dtype(np.uint8)


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
    form = FP4_FORMS.get(group)
    *rows, half = codes.shape if len(codes.shape) in (2, 3) else (0, 0)
    fits = form is not None and codes.dtype == _UINT8 and 0 not in codes.shape and 2 * half % group == 0
    # Bytes of scales are the form's, where the dtype does not say so; beside a factor it does.
    fits = fits and (scales.dtype == FP4_FORMS[group].scale_dtype or (scales.dtype == _UINT8 and not whole))
    fits = fits and scales.shape == (*rows, 2 * half // group)
    factor = whole.reshaped((1,) if len(rows) == 1 else (rows[0],)) if whole else None
    if form is None or not fits or (whole and (factor is None or whole.dtype != np.float32)):
        parts = ", ".join(
            f"{part.name} ({part.dtype} {part.shape})" for part in (codes, scales, whole) if part
        )
        raise UserError(f"{parts} are no 4-bit floats and scales for groups of {group}: download them again")
    return ScaledTensor(
        form.name,
        codes,
        Scales(scales, kind=form.scale_dtype, whole=factor, divides=divides),
        group,
        E2M1_VALUES,
        form if len(rows) == 1 else None,
    )
