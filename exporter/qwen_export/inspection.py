"""What an artifact holds and where it can run, from its own files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from pathlib import Path
from typing import Any

from qwen_common.artifact_folder import open_folder
from qwen_common.manifest import Manifest, StoredAs

from qwen_export.backends.registry import export_backend

_FACTS = (
    *(
        "model",
        "source",
        "adapters",
        "switched_adapters",
        "profile",
        "backend",
        "provider",
        "device",
        "lowering",
    ),
    *("onnxruntime", "openvino", "nncf", "activation_dtype", "context_length"),
)


def inspect(artifact: Path) -> dict[str, Any]:
    """What `artifact` is: the manifest's facts, sizes and precisions by role, and what its backend finds.

    Raises:
        UserError: as `open_folder`.
    """
    manifest = open_folder(artifact)
    found = {
        "artifact": artifact.name,
        **{fact: value for fact, value in manifest.items() if fact in _FACTS},
        "bytes": sum(entry["size"] for entry in manifest["files"].values()),
        "roles": {
            role: {"bytes": manifest["bytes_by_role"][role], "precision": precision}
            for role, precision in precisions(manifest).items()
        },
    }
    return found | export_backend(manifest["backend"]).inspect(artifact, manifest)


def precisions(manifest: Manifest) -> dict[str, str]:
    """How each role of `bytes_by_role` is stored, in words."""
    recipe, carried = manifest["recipe"], set(manifest["carried_over"])
    per_channel = export_backend(manifest["backend"]).per_channel
    layers = manifest["settings"].get("layer_weights", {}).values()
    found = {}
    for role in manifest["bytes_by_role"]:
        forms = Counter(
            _precision(layer[role], role in carried, per_channel) for layer in layers if role in layer
        )
        several = "; ".join(f"{form} in {count} layers" for form, count in forms.most_common())
        found[role] = several if len(forms) > 1 else next(iter(forms), "")
        found[role] = found[role] or _precision(recipe.get(role), role in carried, per_channel)
    frequent = manifest["settings"].get("frequent_tokens")
    if frequent and frequent["share"]:
        form = _precision(frequent, False, per_channel)
        for role in {"embedding", "lm_head"} & found.keys() - carried:
            found[role] += f"; {form} in the first {frequent['share']:.3g} of ids"
    return found


def _precision(form: StoredAs | None, carried: bool, per_channel: Set[str]) -> str:
    if carried:
        return "as in the checkpoint"
    if form is None or form["precision"] == "float":
        return "float"
    fitted = "" if form["symmetric"] else ", zero points"
    block = "one scale a row" if form["precision"] in per_channel else f"block {form['block_size']}"
    return f"{form['precision']}, {block}{fitted}"
