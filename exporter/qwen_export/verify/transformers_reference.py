"""The reference itself against transformers, which shares none of its code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from qwen_common.errors import UserError, one_line

from qwen_export import reference
from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.checkpoint.checkpoint import Checkpoint, listed
from qwen_export.checkpoint.tensors.tensor import forms_of
from qwen_export.opening import is_gguf
from qwen_export.reference import Weights, log_softmax

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 64  # compared, at most
# Both are float32 and add up in different orders: 1e-12 and 1e-10 are usual.
_LEAST_COSINE, _MOST_DIVERGENCE = 0.9999, 1e-4
_FLOAT32_BYTES = 4
_MOST_SHOWN = 200  # characters of somebody else's message
_WITHOUT = "verify without --reference transformers"
# By `quant_method`: what transformers 5.24 makes of it without an error (run).
_MISREAD = {
    "mlx": "takes MLX's layout for its own",
    "modelopt": "leaves ModelOpt's scales out",
    "modelopt_fp4": "leaves ModelOpt's scales out",
}
_ROUNDED = {"NVFP4", "NF4", "FP4"}  # to bfloat16 as they are dequantised (run: a cosine of 0.993 to 0.9995)
_INSTALL = "pip install torch 'transformers>=5.5'"


@dataclass(frozen=True)
class Agreement:
    """transformers' logits and the reference's, position by position.

    Attributes:
        tokens: compared, of one text.
        cosine: of the angle between them, the worst position's.
        kl_divergence: in nats, the worst position's.
    """

    versions: dict[str, str]
    tokens: int
    cosine: float
    kl_divergence: float

    @property
    def agrees(self) -> bool:
        return self.cosine >= _LEAST_COSINE and self.kl_divergence <= _MOST_DIVERGENCE

    def as_json(self) -> dict[str, Any]:
        """For report.json."""
        return {
            "versions": self.versions,
            "tokens": self.tokens,
            "cosine": self.cosine,
            "kl_divergence": self.kl_divergence,
            "agrees": self.agrees,
        }


def require_transformers(checkpoint: Checkpoint) -> None:
    """Raises:
    UserError: PyTorch or transformers is missing, the whole model in float32 does not fit the memory, or
        the checkpoint is a GGUF file, has adapters merged into it, or weights in a form that transformers
        does not read, or reads less exactly.
    """
    forms = sum((forms_of(tensor) for tensor in checkpoint.tensors.values()), Counter[str]())
    if is_gguf(checkpoint.source):
        raise UserError(f"transformers has no reader for GGUF files of this architecture: {_WITHOUT}")
    if checkpoint.adapters:
        raise UserError(
            f"transformers reads the checkpoint's files, which are without the adapters: {_WITHOUT}"
        )
    if reason := _MISREAD.get(checkpoint.quantization):
        raise UserError(f"transformers {reason}: {_WITHOUT}")
    if rounded := sorted(_ROUNDED & forms.keys()):
        raise UserError(
            f"transformers rounds weights in {rounded[0]} to bfloat16 as it dequantises them: {_WITHOUT}"
        )
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(f"--reference transformers needs {error.name}: {_INSTALL}") from error
    needed = _FLOAT32_BYTES * sum(
        int(np.prod(spec.shape, dtype=np.int64)) for spec in checkpoint.config.tensors().values()
    )
    available = psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"transformers holds the whole model in float32: that is {needed / 1e9:.1f} GB, and "
            f"{available / 1e9:.1f} are free here: verify without --reference transformers, or on a larger "
            "machine"
        )


def compare(checkpoint: Checkpoint, ids: Sequence[int]) -> Agreement:
    """Both on the first of `ids`. The context is not stretched, whatever the artifact's.

    Raises:
        UserError: as `require_transformers`, or transformers cannot load the checkpoint.
    """
    require_transformers(checkpoint)
    import torch
    import transformers

    tokens = np.asarray(ids, np.int64)[None, :TOKENS]
    try:
        theirs = _answer(checkpoint, torch.from_numpy(tokens))
    except UserError:
        raise
    except Exception as error:  # whatever its loaders, their libraries and its layers raise
        raise UserError(
            f"transformers cannot run {checkpoint.root} ({type(error).__name__}: "
            f"{one_line(str(error))[:_MOST_SHOWN]}): {_WITHOUT}"
        ) from error
    return agreement(
        {"torch": str(torch.__version__), "transformers": transformers.__version__},
        _logits(checkpoint.config, Weights(checkpoint.tensors), tokens),
        theirs,
    )


def agreement(versions: dict[str, str], ours: np.ndarray, theirs: np.ndarray) -> Agreement:
    """From logits [tokens, vocab] of both."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    cosines = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    expected, found = log_softmax(b), log_softmax(a)
    divergence = (np.exp(expected) * (expected - found)).sum(-1)
    return Agreement(versions, len(ours), float(cosines.min()), float(divergence.max()))


def _logits(config: TextConfig, weights: Weights, ids: np.ndarray) -> np.ndarray:
    """float32 [tokens, vocab] of ids [1, tokens]."""
    hidden = np.empty(0)
    for found in reference.forward(config, weights, ids):
        hidden = found
    return reference.logits(config, weights, hidden)[0]


def _answer(checkpoint: Checkpoint, ids: Tensor) -> np.ndarray:
    """Logits float32 [tokens, vocab]."""
    import torch
    import transformers

    logs: Any = transformers.utils.logging
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    options: dict[str, Any] = {}
    if checkpoint.quantization == "fp8":
        options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
    elif checkpoint.quantization == "compressed-tensors":
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint.root, dtype=torch.float32, output_loading_info=True, **options
    )
    model, found = loaded
    if missing := sorted(found["missing_keys"]):  # it would take random numbers
        raise UserError(f"transformers finds in {checkpoint.root} no {listed(missing)}: {_WITHOUT}")
    if checkpoint.quantization == "bitsandbytes":
        model = model.dequantize()
    with suppress(ValueError):  # some quantised models take no other dtype
        model = model.float()
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits[0].float().numpy()
