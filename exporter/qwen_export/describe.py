"""What both backends write last: the artifact's model card and its manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from qwen_common import manifest as manifests
from qwen_common.manifest import Manifest, RunsOn, Settings
from qwen_common.version import own_version
from qwen_profiles.schema import Profile

from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.graph.model import cache_bytes_per_token
from qwen_export.model_card import README, model_card


def describe(
    checkpoint: Checkpoint,
    profile: Profile,
    staged: Path,
    *,
    runs_on: RunsOn,
    context_length: int,
    files: Iterable[Path],
    bytes_by_role: Mapping[str, int],
    carried_over: Iterable[str],
    all_logits: bool,
    image_prompt_tokens: int,
    runtime: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write the model card and the manifest of the artifact in `staged`; returns the manifest.

    Args:
        runs_on: what it needs of its backend.
        context_length: tokens of prompt and answer together.
        files: the artifact's, but for these two.
        bytes_by_role, carried_over, all_logits, image_prompt_tokens, runtime: as in `Manifest`.
    """
    name = model_name(checkpoint)
    manifest: Manifest = {
        "format_version": manifests.FORMAT_VERSION,
        "qwen_edge": own_version(),
        "model": {"name": name, "model_type": checkpoint.model_type},
        "source": {"checkpoint": name, "revision": checkpoint.revision},
        "profile": profile.name,
        "backend": str(profile.backend),
        "provider": profile.provider,
        **runs_on,  # type: ignore[typeddict-item]  # it might hold the fields that are set below
        "activation_dtype": profile.activation_dtype,
        "recipe": {
            role: {
                "precision": form.precision,
                "block_size": form.block_size,
                "symmetric": form.symmetric,
            }
            for role, form in profile.weights.items()
        },
        "context_length": context_length,
        "files": {path.name: manifests.file_entry(path) for path in files},
        "settings": cast(Settings, profile.model_dump(mode="json")),
        "bytes_by_role": dict(bytes_by_role),
        "carried_over": list(carried_over),
        "all_logits": all_logits,
        "cache_bytes_per_token": cache_bytes_per_token(checkpoint.config, np.dtype(profile.activation_dtype)),
    }
    if checkpoint.vision:
        manifest["image_prompt_tokens"] = image_prompt_tokens
    if runtime is not None:
        manifest["runtime"] = dict(runtime)
    (staged / README).write_text(model_card(manifest, None), encoding="utf-8")
    manifest["files"][README] = manifests.file_entry(staged / README)
    manifests.write(staged, manifest)
    return manifest


def model_name(checkpoint: Checkpoint) -> str:
    """The hub id, or the folder's own name: never where it lay on this machine."""
    return checkpoint.root.name if Path(checkpoint.source).exists() else checkpoint.source
