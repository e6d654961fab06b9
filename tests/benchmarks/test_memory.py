"""What the planner takes a node to hold in memory is what a process holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from qwen_export.backends.onnx.estimate import FLOATS_PER_BLOCK, FLOATS_PER_TWO_BIT_BLOCK

from benchmarks.memory import Case, measure

_CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(
    not _CPUINFO.exists() or "avx512_vnni" not in _CPUINFO.read_text(),
    reason="other CPUs have other layouts, which were not measured",
)
@pytest.mark.parametrize(
    ("operator", "bits", "block", "held_floats"),
    [
        ("QMoE", 4, 32, FLOATS_PER_BLOCK),
        ("QMoE", 2, 64, FLOATS_PER_TWO_BIT_BLOCK),
        ("MatMulNBits", 4, 32, FLOATS_PER_BLOCK),
    ],
)
def test_a_node_holds_its_codes_and_floats_for_each_block(
    operator: str, bits: int, block: int, held_floats: float
) -> None:
    held = measure(Case(operator, bits, block, 4), {})
    codes_and_scale, floats = block * bits // 8 + 4, 4 * (held_floats - 1)
    assert held.private == pytest.approx(held.data * (codes_and_scale + floats) / codes_and_scale, rel=0.05)
    assert held.mapped < 0.1 * held.data  # scales and codes of the file are not read again


@pytest.mark.parametrize(("operator", "block"), [("MXFP4", 32), ("NVFP4", 16)])
def test_fp4_experts_stay_in_the_file(operator: str, block: int) -> None:
    held = measure(Case(operator, 4, block, 4), {})
    assert held.private < 0.1 * held.data
    assert held.mapped == pytest.approx(held.data, rel=0.1)
