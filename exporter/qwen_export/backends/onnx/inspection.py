"""What an artifact holds and where it can run, from its own files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from qwen_common import manifest as manifests
from qwen_common.errors import UserError
from qwen_common.manifest import BackendName, Manifest, StoredAs
from qwen_common.providers import PROVIDERS

from qwen_export.backends.onnx.kernels import KERNELS

# The type of what com.microsoft's operators take; others take indices and shapes too.
_TENSORS = {"float32": "tensor(float)", "float16": "tensor(float16)"}


def inspect(artifact: Path) -> dict[str, Any]:
    """What `artifact` is: the manifest's facts, sizes and precisions by role, operators, and where it runs.

    For ONNX Runtime `providers` has for each execution provider the nodes that it has kernels for, those that
    it lacks by operator, and whether it `runs` the artifact: null where it publishes no table of kernels.
    For OpenVINO there is what `inspect_ir` gives.

    Raises:
        UserError: not an artifact, or its files are not those that its manifest lists.
    """
    manifest = manifests.read(artifact)
    manifests.check_files(artifact, manifest)
    facts = (
        *("model", "source", "profile", "backend", "provider", "device", "lowering"),
        *("onnxruntime", "openvino", "nncf", "activation_dtype", "context_length"),
    )
    found = {
        "artifact": artifact.name,
        **{fact: value for fact, value in manifest.items() if fact in facts},
        "bytes": sum(entry["size"] for entry in manifest["files"].values()),
        "roles": {
            role: {"bytes": manifest["bytes_by_role"][role], "precision": precision}
            for role, precision in precisions(manifest).items()
        },
    }
    if manifest["backend"] == BackendName.OPENVINO:
        from qwen_export.backends.openvino.inspection import inspect_ir

        return found | inspect_ir(artifact, manifest)
    graphs = {name: _operators(artifact / name) for name in sorted(manifest["files"]) if _is_graph(name)}
    total = sum(graphs.values(), Counter[tuple[str, str]]())
    return found | {
        "graphs": {name: sum(operators.values()) for name, operators in graphs.items()},
        "operators": {
            f"{domain}::{name}" if domain else name: n for (domain, name), n in total.most_common()
        },
        "providers": {
            provider: _coverage(provider, total, manifest["activation_dtype"]) for provider in PROVIDERS
        },
    }


def _coverage(provider: str, operators: Counter[tuple[str, str]], dtype: str) -> dict[str, Any]:
    nodes, kernels = sum(operators.values()), KERNELS[provider]
    if kernels is None:
        return {"runs": None, "nodes": nodes, "covered": None, "missing": {}}
    missing = {
        name: count
        for (domain, name), count in operators.items()
        if name not in kernels.get(domain, {}) or (domain and _TENSORS[dtype] not in kernels[domain][name])
    }
    covered = nodes - sum(missing.values())
    return {"runs": not missing, "nodes": nodes, "covered": covered, "missing": missing}


def _is_graph(name: str) -> bool:
    return name.endswith(".onnx")


def _operators(graph: Path) -> Counter[tuple[str, str]]:
    """(domain, operator) of every node, those in the bodies of control flow too."""
    try:
        found = onnx.load(graph, load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise UserError(f"{graph} cannot be read ({error}): copy the artifact again") from error
    return _nodes(found)


def _nodes(graph: onnx.GraphProto) -> Counter[tuple[str, str]]:
    counts = Counter((node.domain, node.op_type) for node in graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                counts += _nodes(attribute.g)
    return counts


def precisions(manifest: Manifest) -> dict[str, str]:
    """How each role of `bytes_by_role` is stored, in words."""
    recipe, carried = manifest["recipe"], set(manifest["carried_over"])
    # NNCF's have one scale a row.
    by_rows = {"int8"} if manifest["backend"] == BackendName.OPENVINO else set()
    layers = manifest["settings"].get("layer_weights", {}).values()
    found = {}
    for role in manifest["bytes_by_role"]:
        forms = Counter(
            _precision(layer[role], role in carried, by_rows) for layer in layers if role in layer
        )
        several = "; ".join(f"{form} in {count} layers" for form, count in forms.most_common())
        found[role] = several if len(forms) > 1 else next(iter(forms), "")
        found[role] = found[role] or _precision(recipe.get(role), role in carried, by_rows)
    return found


def _precision(form: StoredAs | None, carried: bool, by_rows: Set[str]) -> str:
    if carried:
        return "int4, as in the checkpoint"
    if form is None or form["precision"] == "float":
        return "float"
    fitted = "" if form["symmetric"] else ", zero points"
    block = "one scale a row" if form["precision"] in by_rows else f"block {form['block_size']}"
    return f"{form['precision']}, {block}{fitted}"
