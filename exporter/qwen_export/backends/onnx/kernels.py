"""Which operators, on which types, each execution provider has a kernel for: data, of the operators we use.

`kernel_tables` writes the file, from the providers' own packages. It has an entry for each provider of
`qwen_common.providers`; null where nothing is known, as of OpenVINO's provider, which compiles subgraphs.
"""

from __future__ import annotations

import json
from importlib.resources import files

KERNELS_FILE = "kernels.json"
FLOAT = frozenset({"tensor(float)", "tensor(float16)"})
Kernels = dict[str, dict[str, frozenset[str]]]  # domain -> operator -> types of T, the main input


def _read() -> dict[str, Kernels | None]:
    content = json.loads((files("qwen_export.backends.onnx") / KERNELS_FILE).read_text(encoding="utf-8"))
    return {
        provider: entry
        and {
            domain: {operator: frozenset(types) for operator, types in operators.items()}
            for domain, operators in entry["operators"].items()
        }
        for provider, entry in content.items()
    }


# By the provider's key; None where nothing is known.
KERNELS = _read()
