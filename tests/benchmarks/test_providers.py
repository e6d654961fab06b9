"""benchmarks/providers.py: what its figures are. tests/exporter/graph/test_webgpu.py runs the providers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import providers
from benchmarks.support.provider import CPU, Provider


def test_a_table_of_the_cpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "LOWERINGS", ("fused",))
    monkeypatch.setattr(providers, "TINY_MOE", providers.TINY)
    rows = list(providers.rows({"CPU": Provider(CPU)}, "float32", tmp_path))
    assert [row.checkpoint for row in rows] == ["tiny-dense", "tiny-dense", "tiny-vl", "tiny-vl, tower"]
    assert all(abs(row.divergence) < 1e-6 for row in rows)
    assert all(row.on_provider == row.copies == 0 and row.on_cpu > 100 for row in rows)


@pytest.mark.parametrize(
    "name, key", [(CPU, "cpu"), ("DmlExecutionProvider", "dml"), ("onnxruntime_ep_webgpu", "webgpu")]
)
def test_a_provider_is_known_by_its_name_or_its_module(name: str, key: str) -> None:
    assert Provider(name).record.key == key


def test_divergence_is_of_the_distributions() -> None:
    expected = np.log(np.array([[0.5, 0.5], [0.25, 0.75]]))
    found = np.log(np.array([[0.5, 0.5], [0.75, 0.25]])) + 7  # logits, up to a constant
    assert providers.divergence(found, expected) == pytest.approx(0.5 * 0.5 * np.log(3))


def test_copies_are_no_nodes_of_the_provider() -> None:
    ran = {"Gpu": {"MatMul": 5, "MemcpyFromHost": 2}, CPU: {"Shape": 3}}
    assert providers.counted(ran) == (5, 3, 2)


def test_another_interpreter_with_another_provider() -> None:
    name, found = providers.peer('DirectML=wine python.exe:DmlExecutionProvider:{"device_id":"0"}')
    assert name == "DirectML" and list(found.command) == ["wine", "python.exe"]
    assert found.name == "DmlExecutionProvider" and found.options == {"device_id": "0"}
