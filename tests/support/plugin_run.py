"""An artifact's decoder on a plug-in provider, in a process of its own: python plugin_run.py MODULE ARTIFACT

Reads JSON from standard input, {"ids": [...], "chunks": [...]}: the token ids of one sequence, and how many
of them each run takes. Writes `logits.npy` float32 [tokens, vocab] into the current folder, and prints as
JSON the operators of the nodes that ran, by provider: {"WebGpuExecutionProvider": {"MatMulNBits": 33, ...}}.
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


def main() -> None:
    plugin, artifact = import_module(sys.argv[1]), Path(sys.argv[2])
    asked = json.load(sys.stdin)
    ort.set_default_logger_severity(3)
    ort.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == plugin.get_ep_name()]
    if not devices:
        sys.exit(f"{plugin.get_ep_name()} finds no device")
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = "profile"
    options.add_provider_for_devices(devices, {})
    session = ort.InferenceSession(artifact / "model.onnx", options)

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
            "input_ids": np.array([asked["ids"][start:stop]], np.int64),
            "attention_mask": np.ones((1, stop), np.int64),
            "position_ids": np.broadcast_to(np.arange(start, stop), (3, 1, count)).astype(np.int64),
            **states,
        }
        found = dict(zip(outputs, session.run(None, feeds), strict=True))
        states = {name: found["present." + name.split(".", 1)[1]] for name in states}
        logits.append(found["logits"][0])
        start = stop
    np.save("logits.npy", np.concatenate(logits).astype(np.float32))

    ran: dict[str, set[tuple[str, str]]] = {}
    for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            node = (event["args"]["op_name"], event["name"])
            ran.setdefault(event["args"]["provider"], set()).add(node)
    print(json.dumps({name: Counter(operator for operator, _ in nodes) for name, nodes in ran.items()}))


if __name__ == "__main__":
    main()
