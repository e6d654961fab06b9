"""What is written last, whatever the backend: the artifact's model card and its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
from qwen_common import manifest as manifests
from qwen_common.manifest import Manifest, Settings, Source
from qwen_common.version import own_version
from qwen_profiles.schema import Profile

from qwen_export.adapters.switched import adapter_file
from qwen_export.backends.protocol import Written
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.graph.model import cache_bytes_per_token
from qwen_export.model_card import README, model_card


def describe(checkpoint: Checkpoint, profile: Profile, staged: Path, written: Written) -> Manifest:
    """Write the model card and the manifest of the artifact in `staged`; returns the manifest."""
    name = model_name(checkpoint)
    manifest: Manifest = {
        "format_version": manifests.FORMAT_VERSION,
        "qwen_edge": own_version(),
        "model": {"name": name, "model_type": checkpoint.model_type},
        "source": source_of(checkpoint),
        "profile": profile.name,
        "backend": str(profile.backend),
        "provider": profile.provider,
        **written.runs_on,  # type: ignore[typeddict-item]  # it might hold the fields that are set below
        "activation_dtype": profile.activation_dtype,
        "recipe": {
            role: {
                "precision": form.precision,
                "block_size": form.block_size,
                "symmetric": form.symmetric,
            }
            for role, form in profile.weights.items()
        },
        "context_length": written.context_length,
        "files": {path.name: manifests.file_entry(path) for path in sorted(staged.iterdir())},
        "settings": cast(Settings, profile.model_dump(mode="json")),
        "bytes_by_role": dict(written.bytes_by_role),
        "carried_over": list(written.carried_over),
        "all_logits": written.all_logits,
        "cache_bytes_per_token": cache_bytes_per_token(checkpoint.config, np.dtype(profile.kv_dtype)),
    }
    if checkpoint.adapters:
        manifest["adapters"] = list(checkpoint.adapters)
    if checkpoint.switched_adapters:
        manifest["switched_adapters"] = [
            {**adapter.described, "file": adapter_file(adapter.described["name"])}
            for adapter in checkpoint.switched_adapters
        ]
    if written.image_prompt_tokens is not None:
        manifest["image_prompt_tokens"] = written.image_prompt_tokens
    if (min_p := checkpoint.generation.min_p) is not None:
        manifest["sampling"] = {"min_p": min_p}
    if written.runtime is not None:
        manifest["runtime"] = dict(written.runtime)
    (staged / README).write_text(model_card(manifest, None), encoding="utf-8")
    manifest["files"][README] = manifests.file_entry(staged / README)
    manifests.write(staged, manifest)
    return manifest


def source_of(checkpoint: Checkpoint) -> Source:
    """What the manifest says of it."""
    source: Source = {"checkpoint": model_name(checkpoint), "revision": checkpoint.revision}
    return source if checkpoint.identity is None else {**source, "identity": checkpoint.identity}


def model_name(checkpoint: Checkpoint) -> str:
    """The hub id, or the folder's own name: never where it lay on this machine."""
    return checkpoint.root.name if Path(checkpoint.source).exists() else checkpoint.source
