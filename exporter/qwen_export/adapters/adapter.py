"""An adapter's folder: configuration, tensors by what they belong to, and its entry in the manifest."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwen_common.errors import UserError
from qwen_common.manifest import MergedAdapter, file_entry

from qwen_export.adapters.config import ADAPTER_CONFIG, AdapterConfig, read_adapter_config
from qwen_export.checkpoint.hub import download, refuse_links_out
from qwen_export.checkpoint.shards import plain_tensors
from qwen_export.checkpoint.tensors.names import tensor_name
from qwen_export.checkpoint.tensors.plain import FLOATS, PlainTensor

ADAPTER_TENSORS = "adapter_model.safetensors"
# What PEFT calls the parts of a module; the name of the adapter stands in some where others wrote the file.
_PART = re.compile(
    r"(.+?)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|token_adapter)"
    r"(?:\.(?:default|trainable_tokens_delta))?(\.weight|\.bias)?"
)
_SAVED = re.compile(r"\.modules_to_save(?:\.default)?(?=\.)")
_BASE_LAYER = ".base_layer"


@dataclass(frozen=True)
class Part:
    """One tensor of an adapter.

    Attributes:
        module: what it belongs to, by the model's name for it; `base_layer` may be at its end.
        kind: `lora_A`, ... as PEFT calls it; `lora_B.bias`; "" for a tensor of the module's own.
        key: the module by the name that it had in training, without `base_model.model.`.
    """

    module: str
    kind: str
    key: str
    stored_name: str
    tensor: PlainTensor


@dataclass(frozen=True)
class Adapter:
    """An adapter that was found whole.

    Attributes:
        weight: what its scaling is multiplied with.
        parts: by module, then by kind; a tensor of the module's own by its name in the model, under "".
    """

    name: str
    root: Path
    weight: float
    config: AdapterConfig
    parts: Mapping[str, Mapping[str, Part]]

    @classmethod
    def open(cls, given: str) -> Adapter:
        """Open `FOLDER`, `FOLDER=weight`, or a hub id in the folder's place.

        Raises:
            UserError: no such folder or hub id, no LoRA adapter of PEFT's, or one that is damaged.
        """
        source, weight = _split(given)
        local = Path(source)
        if not local.is_dir() and (source.count("/") != 1 or source.startswith((".", "~", "/"))):
            raise UserError(f"--adapter {source}: no such folder: give the folder of a PEFT adapter")
        root = local.resolve() if local.is_dir() else download(source, None)
        name = root.name if local.is_dir() else source
        refuse_links_out(root)
        config = read_adapter_config(root)
        path = root / ADAPTER_TENSORS
        if not path.is_file():
            if (root / "adapter_model.bin").is_file():
                raise UserError(
                    f"{root} holds pickled weights, which are never loaded: save it as safetensors"
                )
            raise UserError(f"{root} has no {ADAPTER_TENSORS}: is the adapter complete?")
        parts: dict[str, dict[str, Part]] = {}
        for stored_name, tensor in plain_tensors(path).items():
            part = _part(stored_name, tensor)
            kinds = parts.setdefault(part.module, {})
            if part.kind in kinds:
                raise UserError(
                    f"{path}: {kinds[part.kind].stored_name} and {stored_name} are the same tensor: remove "
                    "the wrong one"
                )
            kinds[part.kind] = part
        if not parts:
            raise UserError(f"{path} has no tensors: save the adapter again")
        return cls(name, root, weight, config, parts)

    def described(self) -> MergedAdapter:
        files = {name: file_entry(self.root / name) for name in (ADAPTER_CONFIG, ADAPTER_TENSORS)}
        return {"name": self.name, "weight": self.weight, "files": files}


def _split(given: str) -> tuple[str, float]:
    source, equals, weight = given.rpartition("=")
    if not equals or Path(given).exists():
        return given, 1.0
    try:
        found = float(weight)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"--adapter {given}: '{weight}' is no weight: write FOLDER, or FOLDER=0.5")
    return source, found


def _part(stored_name: str, tensor: PlainTensor) -> Part:
    if tensor.dtype not in FLOATS or 0 in tensor.shape or not tensor.shape:
        raise UserError(
            f"{ADAPTER_TENSORS}: tensor {stored_name} is {tensor.dtype} {tensor.shape}, and an adapter's are "
            "bf16, fp16 or fp32: save it again"
        )
    name = _SAVED.sub("", stored_name)
    trained = name.removeprefix("base_model.model.")
    ours = _PART.fullmatch(tensor_name(name))
    if not ours:
        return Part(tensor_name(name), "", trained, stored_name, tensor)
    _, kind, suffix = ours.groups()
    key = trained[: trained.rindex(f".{kind}")].replace(_BASE_LAYER, "")
    return Part(ours[1], f"{kind}.bias" if suffix == ".bias" else kind, key, stored_name, tensor)
