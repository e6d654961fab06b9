"""llama.cpp's own quantisation of a GGUF file: python -m benchmarks.peers.llama_quantize SOURCE TARGET Q2_K

Runs in the environment of llama.cpp (see benchmarks/decode.py). `--imatrix F.npz` has the importance of each
tensor's input features, by the tensor's name: [in], or [experts, in].
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from typing import Any

import llama_cpp
import numpy as np

_ERROR = 4  # ggml.h


def quantize(source: str, target: str, form: str, importance: dict[str, np.ndarray]) -> None:
    """Write `target`, its tensors in what llama.cpp chooses for `form`, a name such as Q4_K_M.

    Raises:
        SystemExit: llama.cpp has no such form, or cannot quantise `source` to it.
    """
    names = [name for name in dir(llama_cpp) if name == f"LLAMA_FTYPE_MOSTLY_{form}"]
    if not names:
        raise SystemExit(f"llama.cpp has no {form}")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, names[0])
    params.nthread = 0
    params.allow_requantize = True
    held = [np.ascontiguousarray(values, np.float32) for values in importance.values()]
    entries = (llama_cpp.llama_model_imatrix_data * (len(held) + 1))()  # the last one is empty
    for entry, name, values in zip(entries, importance, held, strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if held:
        params.imatrix = entries
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp cannot quantise {source} to {form}")


@llama_cpp.llama_log_callback
def _errors(level: int, text: bytes, user_data: Any) -> None:
    if level == _ERROR:
        sys.stderr.write(text.decode(errors="replace"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("form")
    parser.add_argument("--imatrix", metavar="NPZ")
    asked = parser.parse_args()
    llama_cpp.llama_log_set(_errors, None)
    llama_cpp.llama_backend_init()
    quantize(asked.source, asked.target, asked.form, dict(np.load(asked.imatrix)) if asked.imatrix else {})


if __name__ == "__main__":
    main()
