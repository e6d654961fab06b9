"""A graph without states on a plug-in provider, in a process of its own.

python plugin_node.py MODULE MODEL RUNS

Reads `feeds.npz` of the current folder, runs the model as often as asked, and writes its first output of each
run as `outputs.npy`. No node may fall back to the CPU.
"""

from __future__ import annotations

import sys
from importlib import import_module

import numpy as np
import onnxruntime as ort


def main() -> None:
    plugin = import_module(sys.argv[1])
    ort.set_default_logger_severity(3)
    ort.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == plugin.get_ep_name()]
    options = ort.SessionOptions()
    options.add_provider_for_devices(devices, {})
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = ort.InferenceSession(sys.argv[2], options)
    feeds = dict(np.load("feeds.npz"))
    np.save("outputs.npy", np.stack([session.run(None, feeds)[0] for _ in range(int(sys.argv[3]))]))


if __name__ == "__main__":
    main()
