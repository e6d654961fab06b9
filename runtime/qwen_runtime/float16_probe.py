"""Whether the device of a plug-in provider computes float16, found by a run: in a process of its own, because
a driver may end it.

    python -m qwen_runtime.float16_probe NAME LIBRARY

NAME is ONNX Runtime's of the provider. Prints as JSON {"float16": true}.
"""

from __future__ import annotations

import json
import subprocess
import sys

_SECONDS = 60
# An ONNX model of one node, y = x + x for x float16 [4]; a test makes the same with the library onnx.
MODEL = bytes.fromhex(
    "08083a350a0e0a01780a017812017922034164641201675a0f0a0178120a0a08080a12040a020804620f0a0179120a0a08080a12040a02080442040a001011"
)


def computes_float16(name: str, library: str) -> bool | None:
    """The answer; None where the provider did not run at all."""
    command = [sys.executable, "-m", __name__, name, library]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
        return bool(json.loads(done.stdout)["float16"])
    except (OSError, subprocess.SubprocessError, ValueError, KeyError):
        return None


def main() -> None:
    import numpy as np
    import onnxruntime as ort

    name, library = sys.argv[1:]
    ort.set_default_logger_severity(4)
    ort.register_execution_provider_library(name, library)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_provider_for_devices([d for d in ort.get_ep_devices() if d.ep_name == name], {})
    session = ort.InferenceSession(MODEL, options)
    try:
        (found,) = session.run(None, {"x": np.full(4, 1.5, np.float16)})
        computed = bool((found == 3).all())
    except Exception as error:
        if "f16" not in str(error):
            raise
        computed = False
    print(json.dumps({"float16": computed}))


if __name__ == "__main__":
    main()
