"""What an OpenVINO artifact's IR holds, and which devices here can run it."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from qwen_common.errors import UserError
from qwen_common.manifest import Manifest
from qwen_runtime.backends.openvino import DEVICES, choose_device

from qwen_export.backends.openvino.compress import weights
from qwen_export.backends.openvino.stored import read_model


def inspect_ir(artifact: Path, manifest: Manifest) -> dict[str, Any]:
    """`stored`: element types of the weights by role, each with how many there are; `graphs`, `operators`:
    nodes by file and by kind; `devices`: whether OpenVINO finds each of them here and can run the artifact
    on it, and the reason.

    Raises:
        UserError: OpenVINO is not installed, or cannot read a file.
    """
    stored: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    graphs, operators = {}, Counter[str]()
    for name in sorted(manifest["files"]):
        if not name.endswith(".xml") or name.endswith("tokenizer.xml"):
            continue
        model = read_model(artifact / name)
        kinds = Counter(node.get_type_name() for node in model.get_ops())
        graphs[name] = sum(kinds.values())
        operators += kinds
        for weight in weights(model, Path(name).stem):
            largest = max(weight.sizes, key=weight.sizes.__getitem__)
            stored[weight.role][weight.stored].add(largest)  # what is tied is used twice
    return {
        "stored": {
            role: {kind: len(names) for kind, names in kinds.items()} for role, kinds in stored.items()
        },
        "graphs": graphs,
        "operators": dict(operators.most_common()),
        "devices": {device: _device(device) for device in DEVICES},
    }


def _device(device: str) -> dict[str, Any]:
    import openvino

    try:
        _, reason = choose_device(device, device, openvino.Core().available_devices)
    except UserError as error:
        return {"runs": False, "reason": str(error)}
    return {"runs": True, "reason": reason}
