"""Answers of the trained checkpoint's artifact, through real ONNX Runtime GenAI."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import qwen_runtime
import torch
from qwen_runtime import Model, Sampling
from transformers import Qwen3_5ForCausalLM

from benchmarks.support.artifacts import float_profile, make_artifact
from benchmarks.support.checkpoints import TINY
from tests.support.greedy import check_greedy_answers

GREEDY = Sampling(temperature=0)


@pytest.mark.parametrize("lowering", ["fused", "portable"])
def test_greedy_answers_are_those_of_transformers(lowering: str, tmp_path: Path) -> None:
    reference = Qwen3_5ForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    artifact = make_artifact(TINY, float_profile(lowering), tmp_path / "out", all_logits=False)
    with Model.load(artifact) as model:
        check_greedy_answers(model, TINY, reference)


def test_import_is_light() -> None:
    heavy = ["torch", "transformers", "onnx", "onnxruntime", "pydantic", "rich", "jinja2"]

    def imported(module: str) -> tuple[float, str]:
        """Seconds of the processor, and which of the heavy ones it brings."""
        code = (
            f"import sys, time\nstart = time.process_time()\nimport {module}\n"
            f"print(time.process_time() - start)\nprint([name for name in {heavy} if name in sys.modules])"
        )
        seconds, found = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
        return float(seconds), found

    runs = [imported("qwen_runtime") for _ in range(3)]
    assert {found for _, found in runs} == {"[]"}
    # NumPy is a third of it; asyncio stands for how fast the machine is.
    assert min(runs)[0] < 10 * min(imported("asyncio") for _ in range(3))[0]


def test_where_names_were_before() -> None:
    from qwen_runtime.generation import TokenLogprob
    from qwen_runtime.model import ModelInfo, Sampling

    assert (Sampling, ModelInfo, TokenLogprob) == (
        qwen_runtime.Sampling,
        qwen_runtime.ModelInfo,
        qwen_runtime.TokenLogprob,
    )
    with pytest.warns(DeprecationWarning, match="import Guidance from qwen_runtime"):
        from qwen_runtime.backends import Guidance
    assert Guidance is qwen_runtime.Guidance
