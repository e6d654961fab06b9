"""An artifact on one provider, in a process of its own: python plugin_run.py PROVIDER ARTIFACT [OPTIONS]

PROVIDER is the module of a plug-in, or the name of a provider that this onnxruntime has built in, with
OPTIONS in JSON. Reads JSON from standard input, {"graph": "model.onnx", "ids": [...], "chunks": [...]}: the
token ids of one sequence, and how many of them each run takes. Writes `logits.npy` float32 [tokens, vocab]
into the current folder, and prints as JSON the operators of the nodes that ran, by provider:
{"WebGpuExecutionProvider": {"MatMulNBits": 33, ...}}.

With "images": "images.npz" the vision tower runs first. The file has its `pixel_values` and `image_grid_thw`,
and `position_ids` [3, 1, tokens]. `features.npy` float32 [image tokens, hidden] is written too, and the
tower's operators are printed under "vision".
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def profiled(graph: Path, provider: str, options: dict[str, str]) -> ort.InferenceSession:
    """The graph on a provider, with what is left over on the CPU, and with ONNX Runtime's profiler on."""
    ort.set_default_logger_severity(3)
    settings = ort.SessionOptions()
    settings.enable_profiling = True
    settings.profile_file_prefix = "profile"
    if provider in ort.get_available_providers():
        settings.enable_mem_pattern = False  # DirectML takes no other
        session = ort.InferenceSession(graph, settings, providers=[(provider, options)])
        if provider not in session.get_providers():
            sys.exit(f"{provider} does not start")
        return session
    plugin = import_module(provider)
    if plugin.get_ep_name() not in {device.ep_name for device in ort.get_ep_devices()}:
        ort.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == plugin.get_ep_name()]
    if not devices:
        sys.exit(f"{plugin.get_ep_name()} finds no device")
    settings.add_provider_for_devices(devices, options)
    return ort.InferenceSession(graph, settings)


def ran(session: ort.InferenceSession) -> dict[str, dict[str, int]]:
    """Operators of the nodes that have run, by provider; ends the profile."""
    nodes: dict[str, set[tuple[str, str]]] = {}
    for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            node = (event["args"]["op_name"], event["name"])
            nodes.setdefault(event["args"]["provider"], set()).add(node)
    return {name: Counter(operator for operator, _ in found) for name, found in nodes.items()}


def main() -> None:
    provider, artifact, *options = sys.argv[1:]
    asked = json.load(sys.stdin)
    settings = json.loads(options[0]) if options else {}

    def opened(name: str) -> ort.InferenceSession:
        return profiled(Path(artifact) / name, provider, settings)

    ids = np.array([asked["ids"]], np.int64)
    tokens, seen = {"input_ids": ids}, {}
    positions = np.broadcast_to(np.arange(ids.size), (3, 1, ids.size)).astype(np.int64)
    if "images" in asked:
        images = dict(np.load(asked["images"]))
        positions = images.pop("position_ids")
        tower = opened("vision.onnx")
        (features,) = tower.run(None, images)
        np.save("features.npy", features.astype(np.float32))
        embedded = opened("embedding.onnx").run(None, {**tokens, "image_features": features})
        tokens, seen = {"inputs_embeds": embedded[0]}, {"vision": ran(tower)}
    session = opened(asked.get("graph", "model.onnx"))
    outputs = [value.name for value in session.get_outputs()]
    sizes = {"batch_size": 1, "past_sequence_length": 0}
    states = {
        value.name: np.zeros([sizes.get(axis, axis) for axis in value.shape], _DTYPES[value.type])
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    logits, start = [], 0
    for count in asked["chunks"]:
        stop = start + count
        feeds: dict[str, Any] = {
            **{name: value[:, start:stop] for name, value in tokens.items()},
            "attention_mask": np.ones((1, stop), np.int64),
            "position_ids": positions[:, :, start:stop],
            **states,
        }
        found = dict(zip(outputs, session.run(None, feeds), strict=True))
        states = {name: found["present." + name.split(".", 1)[1]] for name in states}
        logits.append(found["logits"][0])
        start = stop
    np.save("logits.npy", np.concatenate(logits).astype(np.float32))
    print(json.dumps({**ran(session), **seen}))


if __name__ == "__main__":
    main()
