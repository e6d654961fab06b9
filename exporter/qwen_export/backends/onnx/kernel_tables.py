"""Writes kernels.json: which operators each execution provider has kernels for, read from its own package.

    python -m qwen_export.backends.onnx.kernel_tables --cuda WHEEL --webgpu WHEEL --amdgpu PAGE

The wheels are Linux builds of onnxruntime-gpu and onnxruntime-ep-webgpu. Documentation pages are out of date,
so nothing comes from them. The CPU's table is the registry of the installed onnxruntime, with types. CUDA's
library has the names of its kernels' classes (C++ run-time type information), one for each type. WebGPU's has
operator names alone; its types are those of runs. AMDGPU has no package yet: its table is a page of
github.com/ROCm/hip-ep, docs/supported-operations.md. DirectML's kernels lie in one library with the CPU's and
cannot be told apart: its table was read in the source of its provider, and is kept.

A kernel that is there may still answer wrongly: what runs have shown is in `qwen_common.providers`.
"""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

from qwen_common.files import as_json
from qwen_common.providers import PROVIDERS

from qwen_export.backends.onnx.kernels import FLOAT, KERNELS_FILE

Table = dict[str, dict[str, list[str]]]  # domain -> operator -> types of T, the main input

_STANDARD, _CONTRIB = "", "com.microsoft"
# What our graphs use, or may come to use.
OPERATORS: Mapping[str, tuple[str, ...]] = {
    _STANDARD: (
        *(
            "Add",
            "Cast",
            "Concat",
            "Conv",
            "Cos",
            "CumSum",
            "Div",
            "Equal",
            "Exp",
            "Expand",
            "Floor",
            "Gather",
        ),
        *(
            "Gemm",
            "Greater",
            "Identity",
            "If",
            "LayerNormalization",
            "LessOrEqual",
            "MatMul",
            "Min",
            "Mul",
            "Range",
            "ReduceSum",
        ),
        *("Reshape", "ScatterElements", "Shape", "Sigmoid", "SimplifiedLayerNormalization", "Sin", "Slice"),
        *(
            "Softmax",
            "Softplus",
            "Split",
            "Squeeze",
            "Sub",
            "Tile",
            "TopK",
            "Transpose",
            "Unsqueeze",
            "Where",
        ),
    ),
    _CONTRIB: (
        *("BranchwiseRMSNorm", "CausalConvWithState", "FastGelu", "FusedMatMul", "GatedDeltaNet"),
        *("GatedRMSNorm", "Gelu", "GroupQueryAttention", "LinearAttention", "LinearAttentionGate"),
        *("MatMulNBits", "MoE", "MultiHeadAttention", "QMoE", "QuickGelu", "RotaryEmbedding"),
        "SkipSimplifiedLayerNormalization",
    ),
}
_MAIN_TYPES = ("T", "T1", "in", "V")  # what schemas call the main input's type, the likeliest first
# Of class names, as compilers mangle template arguments.
_MANGLED = {"If": "tensor(float)", "INS_9MLFloat16E": "tensor(float16)"}


def cpu_table() -> Table:
    """The registry of the installed onnxruntime."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found: dict[tuple[str, str], set[str]] = {}
    for kernel in state.get_all_opkernel_def():
        constraints = kernel.type_constraints
        name = next((name for name in _MAIN_TYPES if name in constraints), next(iter(constraints), None))
        domain = _STANDARD if kernel.domain == "ai.onnx" else kernel.domain
        found.setdefault((domain, kernel.op_name), set()).update(constraints.get(name, []))
    return _table(lambda domain, name: found.get((domain, name)))


def cuda_table(library: bytes) -> Table:
    """From the bytes of libonnxruntime_providers_cuda.so."""
    classes: dict[str, set[str]] = {}
    for length, rest in set(re.findall(rb"N11onnxruntime(?:7contrib)?4cuda(\d+)([A-Za-z0-9_]+)", library)):
        text, size = rest.decode(), int(length)
        classes.setdefault(text[:size], set()).add(text[size:])

    def types(domain: str, name: str) -> set[str] | None:
        if not _names(library, name):
            return None
        arguments = classes.get(name, set())
        stated = {kind for mangled, kind in _MANGLED.items() if any(a.startswith(mangled) for a in arguments)}
        return stated or set(FLOAT)

    return _table(types)


def webgpu_table(library: bytes) -> Table:
    """From the bytes of the plug-in's library."""
    return _table(lambda domain, name: set(FLOAT) if _names(library, name) else None)


def amdgpu_table(page: str) -> Table:
    """From the tables of docs/supported-operations.md: operators in the first column, contrib ones marked."""
    row = r"^\| (\w+)(?: \(`(com\.microsoft|ai\.onnx)`[^|]*\))? \|"
    rows = set(re.findall(row, page, re.MULTILINE))
    found = {(_CONTRIB if domain == _CONTRIB else _STANDARD, name) for name, domain in rows}
    return _table(lambda domain, name: set(FLOAT) if (domain, name) in found else None)


def _names(library: bytes, operator: str) -> bool:
    """Whether the operator's name stands in the library. Linkers let a string lie in a longer one's end, so
    that MoE may be there for QMoE's sake alone: what a run refuses is in the provider's record.
    """
    return operator.encode() + b"\0" in library


def _table(types: Callable[[str, str], set[str] | None]) -> Table:
    table: Table = {}
    for domain, names in OPERATORS.items():
        found = {name: types(domain, name) for name in names}
        table[domain] = {name: sorted(kinds) for name, kinds in found.items() if kinds is not None}
    return table


def library_of(package: Path, ending: str) -> bytes:
    """The file of a wheel, or below an installed package's folder, whose name ends so."""
    if package.is_dir():
        return next(path for path in sorted(package.rglob("*")) if path.name.endswith(ending)).read_bytes()
    with zipfile.ZipFile(package) as wheel:
        return wheel.read(next(name for name in wheel.namelist() if name.endswith(ending)))


def _version(wheel: Path) -> str:
    return wheel.name.split("-")[1]


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuda", type=Path, help="wheel of onnxruntime-gpu")
    parser.add_argument("--webgpu", type=Path, help="wheel of onnxruntime-ep-webgpu")
    parser.add_argument("--amdgpu", type=Path, help="hip-ep's docs/supported-operations.md")
    parser.add_argument("--amdgpu-commit", default="", help="of that page")
    asked = parser.parse_args(None if arguments is None else list(arguments))
    from onnxruntime import __version__ as onnxruntime_version

    path = Path(str(files("qwen_export.backends.onnx") / KERNELS_FILE))
    content = json.loads(path.read_text(encoding="utf-8"))

    def put(provider: str, package: str, version: str, source: str, table: Table) -> None:
        date = datetime.now(UTC).date().isoformat()
        content[provider] = {
            "package": package,
            "version": version,
            "date": date,
            "source": source,
            "operators": table,
        }

    put("cpu", "onnxruntime", onnxruntime_version, "its registry", cpu_table())
    if asked.cuda:
        library = library_of(asked.cuda, "libonnxruntime_providers_cuda.so")
        source = "names of classes in its library"
        put("cuda", "onnxruntime-gpu", _version(asked.cuda), source, cuda_table(library))
    if asked.webgpu:
        library = library_of(asked.webgpu, "libonnxruntime_providers_webgpu.so")
        source = "names of operators in its library"
        put("webgpu", "onnxruntime-ep-webgpu", _version(asked.webgpu), source, webgpu_table(library))
    if asked.amdgpu:
        table = amdgpu_table(asked.amdgpu.read_text(encoding="utf-8"))
        source = "docs/supported-operations.md of github.com/ROCm/hip-ep"
        put("amdgpu", "hip-ep", asked.amdgpu_commit, source, table)
    path.write_bytes(as_json({key: content.get(key) for key in PROVIDERS}))


if __name__ == "__main__":
    main()
