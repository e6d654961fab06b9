"""What becomes of a checkpoint's codes that an artifact does not keep: a line for each kind of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from qwen_export.architecture.mtp import MTP
from qwen_export.architecture.vision import VISION
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor, DerivedTensor, forms_of

_PARTS = {VISION: " of the vision tower", MTP: " of the MTP head"}
_NO_KERNEL = "because no kernel here takes the codes"


def dequantised(
    tensors: Mapping[str, CheckpointTensor], kept: Collection[str] = (), because: str = _NO_KERNEL
) -> list[str]:
    """A line for each form of `tensors`, and part of the model, whose codes are not among the `kept`.

    Args:
        tensors: those that an artifact is made of, by their names.
        because: why not; of those that an adapter changes, that is said.
    """
    found: Counter[tuple[str, str, str]] = Counter()
    for name, tensor in tensors.items():
        if name not in kept:
            part = next((words for prefix, words in _PARTS.items() if name.startswith(prefix)), "")
            why = "because an adapter changes them" if isinstance(tensor, DerivedTensor) else because
            for form, count in forms_of(tensor).items():
                found[part, form, why] += count
    return [
        f"{count} {'weights' if count > 1 else 'weight'}{part} in {form} {'are' if count > 1 else 'is'} "
        f"dequantised, {why}; then stored as the profile says"
        for (part, form, why), count in sorted(found.items())
    ]
