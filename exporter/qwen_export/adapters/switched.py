"""Adapters that an artifact has beside its weights: which of them answers is chosen at run time.

Their factors become inputs of the graph, so what can be switched is LoRA of projections; anything else
changes the weights themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qwen_common.errors import UserError
from qwen_common.manifest import ADAPTER_NAME, BackendName
from qwen_common.providers import CPU
from qwen_profiles.schema import Profile

from qwen_export.adapters.adapter import Adapter
from qwen_export.adapters.places import place
from qwen_export.adapters.updates import LowRank, SwitchedAdapter
from qwen_export.architecture.models.qwen3_5 import EMBEDDING, LM_HEAD
from qwen_export.architecture.tensors import layer_of
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.tensors.fused import join_fused

_MERGE = "merge it with --adapter"


def with_switched_adapters(checkpoint: Checkpoint, given: Sequence[str], profile: Profile) -> Checkpoint:
    """`checkpoint` with the adapters `FOLDER[=weight]`, to be switched when its artifact runs.

    Raises:
        UserError: the profile is not for ONNX Runtime's CPU provider alone, where it was tried; as
            `Adapter.open` and `place`; two of one name; or an adapter changes more than projections.
    """
    if not given:
        return checkpoint
    runs_on = {profile.provider, *profile.fallbacks}
    if profile.backend != BackendName.ONNX or runs_on != {CPU.key}:
        raise UserError(
            f"--adapter-at-runtime was tried on ONNX Runtime's CPU provider only, and profile {profile.name} "
            f"is for {', '.join(sorted(runs_on))}: take a CPU profile, or {_MERGE}"
        )
    kept: dict[str, SwitchedAdapter] = {}
    config = checkpoint.config
    tensors, tied = join_fused(checkpoint.tensors, config.fused), config.tie_word_embeddings
    if tied:
        tensors = {LM_HEAD: tensors[EMBEDDING], **tensors}
    for one in given:
        adapter = Adapter.open(one)
        name = adapter.name.rpartition("/")[2]
        if not ADAPTER_NAME.fullmatch(name):
            raise UserError(
                f"{adapter.root}: an adapter is called as its folder, whose name may have letters, digits, "
                "'.', '_' and '-': rename it"
            )
        if name in kept:
            raise UserError(f"two adapters are called {name}: rename the folder of one")
        placed = place(adapter, tensors, tied)
        updates: dict[str, LowRank] = {}
        for tensor, update in placed.updates:
            of_layer = layer_of(tensor) is not None and tensor in checkpoint.tensors  # else of a fused one
            if not isinstance(update, LowRank) or update.magnitude or not of_layer:
                raise UserError(
                    f"adapter {name} changes {tensor} in a way that cannot be switched at run time (LoRA of "
                    f"projections in the decoder's layers can): {_MERGE}"
                )
            updates[tensor] = update
        kept[name] = SwitchedAdapter({**adapter.described(), "name": name}, updates)
    return replace(checkpoint, switched_adapters=tuple(kept.values()))


def adapter_file(name: str) -> str:
    """In an artifact."""
    return f"{name}.onnx_adapter"
