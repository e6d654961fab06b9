"""The reference itself against transformers, which shares none of its code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from qwen_common.errors import UserError, one_line

from qwen_export import reference
from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.checkpoint.checkpoint import Checkpoint, listed
from qwen_export.checkpoint.config import load_vision_config
from qwen_export.checkpoint.tensors.tensor import forms_of
from qwen_export.opening import is_gguf
from qwen_export.reference import Weights, log_softmax
from qwen_export.verify.adapted import adapted

if TYPE_CHECKING:
    from torch import Tensor, nn

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
_INSTALL_PEFT = "pip install 'peft>=0.21,<0.22'"


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
    UserError: PyTorch, transformers or PEFT is missing, the whole model in float32 does not fit the memory,
        or the checkpoint is a GGUF file, or has weights in a form that transformers does not read, or reads
        less exactly.
    """
    forms = sum((forms_of(tensor) for tensor in checkpoint.tensors.values()), Counter[str]())
    if is_gguf(checkpoint.source):
        raise UserError(
            f"transformers has no reader for GGUF files of this architecture: {_WITHOUT}, or compare with "
            "llama.cpp (docs/checkpoints.md says how)"
        )
    if reason := _MISREAD.get(checkpoint.quantization):
        raise UserError(f"transformers {reason}: {_WITHOUT}")
    if rounded := sorted(_ROUNDED & forms.keys()):
        raise UserError(
            f"transformers rounds weights in {rounded[0]} to bfloat16 as it dequantises them: {_WITHOUT}"
        )
    try:
        if checkpoint.adapters:
            import peft  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        install = _INSTALL_PEFT if error.name == "peft" else _INSTALL
        raise UserError(f"--reference transformers needs {error.name}: {install}") from error
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
        UserError: as `require_transformers`, or transformers cannot load the checkpoint, or PEFT an adapter.
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
    versions = {"torch": str(torch.__version__), "transformers": transformers.__version__}
    if checkpoint.adapters:
        import peft

        versions["peft"] = peft.__version__
    return agreement(
        versions,
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

    def load(kind: Any) -> nn.Module:
        loaded: Any = kind.from_pretrained(
            checkpoint.root, dtype=torch.float32, output_loading_info=True, **options
        )
        model, found = loaded
        if missing := sorted(found["missing_keys"]):  # it would take random numbers
            raise UserError(f"transformers finds in {checkpoint.root} no {listed(missing)}: {_WITHOUT}")
        if checkpoint.quantization == "bitsandbytes":
            model = model.dequantize()
        with suppress(ValueError):  # some quantised models take no other dtype
            model = model.float()
        as_module: nn.Module = model.eval()
        return as_module

    # Adapters were trained on the text model, or on the whole one.
    kinds: list[Any] = [transformers.AutoModelForCausalLM]
    if checkpoint.adapters and load_vision_config(checkpoint.root):
        kinds.append(transformers.AutoModelForImageTextToText)
    weights = [adapter["weight"] for adapter in checkpoint.adapters]
    adapters = list(zip(checkpoint.adapter_folders, weights, strict=True))
    model = adapted([partial(load, kind) for kind in kinds], adapters)
    with torch.no_grad():
        return model(input_ids=ids).logits[0].float().numpy()
