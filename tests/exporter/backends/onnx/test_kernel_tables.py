"""kernels.json against the packages that it was made from: the CPU's, and WebGPU's where the plug-in is."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest
from qwen_export.backends.onnx.kernel_tables import OPERATORS, cpu_table, library_of, webgpu_table
from qwen_export.backends.onnx.kernels import KERNELS, KERNELS_FILE
from qwen_export.graph.targets import CONTRIB_OPERATORS, target_for

CONTENT = json.loads((files("qwen_export.backends.onnx") / KERNELS_FILE).read_text(encoding="utf-8"))
AGAIN = "write it again: python -m qwen_export.backends.onnx.kernel_tables"


def lost(written: dict[str, dict[str, list[str]]], found: dict[str, dict[str, list[str]]]) -> list[str]:
    """What is written and no longer there."""
    return [
        f"{operator} {kind}"
        for domain, operators in written.items()
        for operator, kinds in operators.items()
        for kind in kinds
        if kind not in found[domain].get(operator, ())
    ]


def test_the_cpus_are_those_of_the_installed_onnxruntime() -> None:
    written, found = CONTENT["cpu"]["operators"], cpu_table()
    assert not lost(written, found), AGAIN
    if CONTENT["cpu"]["version"] == version("onnxruntime"):
        assert written == found, AGAIN


def test_the_cpu_has_no_float16_kernels_where_a_graph_could_not_tell() -> None:
    """22 rows of an earlier table, from a documentation page, were wrong."""
    cpu = KERNELS["cpu"]
    assert cpu is not None
    for operator in ("FusedMatMul", "Gelu", "MultiHeadAttention", "QuickGelu", "FastGelu", "MoE"):
        assert cpu["com.microsoft"][operator].isdisjoint({"tensor(float16)"}), operator
    assert "tensor(float16)" in cpu["com.microsoft"]["MatMulNBits"]


@pytest.mark.webgpu
@pytest.mark.skipif(not os.environ.get("QWEN_EDGE_WEBGPU"), reason="QWEN_EDGE_WEBGPU names no folder")
def test_webgpus_are_those_of_the_plug_in() -> None:
    library = library_of(Path(os.environ["QWEN_EDGE_WEBGPU"]), "libonnxruntime_providers_webgpu.so")
    assert not lost(CONTENT["webgpu"]["operators"], webgpu_table(library)), AGAIN


@pytest.mark.parametrize("provider", ["cpu", "cuda", "dml", "webgpu"])
@pytest.mark.parametrize("lowering", ["fused", "portable"])
def test_a_graph_uses_only_what_its_provider_has(provider: str, lowering: str) -> None:
    if (lowering, provider) == ("fused", "dml"):
        return  # profiles refuse it
    kernels = KERNELS[provider]
    assert kernels is not None
    assert target_for(lowering, provider).operators <= set(kernels["com.microsoft"])


def test_every_operator_that_a_graph_may_use_is_looked_for() -> None:
    assert set(OPERATORS["com.microsoft"]) >= CONTRIB_OPERATORS
