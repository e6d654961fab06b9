"""ONNX Runtime GenAI: long prompts, DirectML's ways, and an ONNX Runtime that is too old."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
import qwen_common.errors
import qwen_profiles
import qwen_runtime
from qwen_common import manifest as manifests
from qwen_common.errors import UserError
from qwen_runtime import Model, Sampling, StateSettings

from benchmarks.support.artifacts import directml_profile
from benchmarks.support.checkpoints import TINY
from tests.support.exported import Exported

GREEDY = Sampling(temperature=0)
OLD_PYTHON = os.environ.get("QWEN_EDGE_ORT124_PYTHON")


def test_prompt_longer_than_one_run_of_the_graph(exported: Exported) -> None:
    with Model.load(exported(TINY, directml_profile())) as model:
        generation = model.generate("The statement. " * 100, max_tokens=3, sampling=GREEDY)
        assert len("".join(generation)) and generation.prompt_tokens > 300
        assert model.info.provider == "cpu"
        assert model.info.reason == ("CPU: DirectML is not in this install (onnxruntime-genai-winml has it)")


class OneAppendGenerator(og.Generator):
    """Stands for a generator on DirectML, where ONNX Runtime GenAI refuses a second append."""

    def append_tokens(self, tokens: np.ndarray) -> None:
        if self.token_count():
            raise RuntimeError("Continuous decoding is not supported on the selected device type (DirectML)")
        super().append_tokens(tokens)


def test_directml_takes_the_prompt_at_once(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    with Model.load(exported(TINY, directml_profile())) as model:
        prompt = "The statement. " * 100
        expected = "".join(model.generate(prompt, max_tokens=20, sampling=GREEDY))
        monkeypatch.setattr("onnxruntime_genai.Generator", OneAppendGenerator)
        monkeypatch.setattr(model._backend, "chunk_size", None)  # as the backend finds it for DirectML
        assert "".join(model.generate(prompt, max_tokens=20, sampling=GREEDY)) == expected


def test_directml_runs_without_graph_capture(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured graphs want inputs of one size. This install has no DirectML, so loading ends in an error."""
    asked = []

    class RecordingConfig(og.Config):
        def set_provider_option(self, *option: str) -> None:
            asked.append(option)
            super().set_provider_option(*option)

    monkeypatch.setattr("onnxruntime_genai.Config", RecordingConfig)
    monkeypatch.setattr("onnxruntime_genai.is_dml_available", lambda: True)
    with pytest.raises(UserError, match="DirectML could not load"):
        Model.load(exported(TINY, directml_profile()), provider="dml")
    assert asked == [("dml", "enable_graph_capture", "0")]


def test_pad_tokens_in_a_prompt_are_text(cpu_artifact: Path, tmp_path: Path) -> None:
    """GenAI would hide them from attention, and fail where there are no others. ONNX Runtime itself knows of
    no pad tokens, as transformers does not, whose logits its own are compared with elsewhere."""
    config = json.loads((cpu_artifact / "genai_config.json").read_text())
    end_of_text = config["model"]["bos_token_id"]
    assert config["model"]["pad_token_id"] == -1
    config["model"]["pad_token_id"] = end_of_text  # as in artifacts of before
    older = shutil.copytree(cpu_artifact, tmp_path / "older")
    manifests.put_files(older, manifests.read(older), {"genai_config.json": json.dumps(config).encode()})

    def answers(artifact: Path, **options: Any) -> list[tuple[str, list[float]]]:
        found = []
        with Model.load(artifact, "cpu", **options) as model:
            for prompt in ("<|endoftext|>", "<|endoftext|>The yield", "The<|endoftext|> yield"):
                assert model.encode(prompt).count(end_of_text) == 1
                generation = model.generate(prompt, max_tokens=3, sampling=GREEDY, logprobs=0)
                text = "".join(generation)
                found.append((text, [entry.logprob for entry in generation.logprobs]))
        return found

    expected = answers(cpu_artifact, states=StateSettings())
    for artifact in (cpu_artifact, older):
        for (text, logprobs), (expected_text, likely) in zip(answers(artifact), expected, strict=True):
            assert text == expected_text
            assert logprobs == pytest.approx(likely, abs=1e-4)


def test_a_graph_without_a_graph(cpu_artifact: Path, tmp_path: Path) -> None:
    """A file without a byte is a valid message of protobuf's, and the manifest agrees here."""
    artifact = shutil.copytree(cpu_artifact, tmp_path / "artifact")
    manifests.put_files(artifact, manifests.read(artifact), {"model.onnx": b""})
    with pytest.raises(UserError, match=r"ONNX Runtime could not load .*: .*No graph was found"):
        Model.load(artifact, "cpu")


@pytest.mark.ort124
@pytest.mark.skipif(not OLD_PYTHON, reason="QWEN_EDGE_ORT124_PYTHON does not name an interpreter")
def test_onnxruntime_that_is_too_old(cpu_artifact: Path) -> None:
    assert OLD_PYTHON is not None
    roots = [
        str(Path(module.__file__).parents[1]) for module in (qwen_runtime, qwen_profiles, qwen_common.errors)
    ]
    code = (
        f"import sys\nsys.path[:0] = {roots}\nfrom qwen_runtime import Model\n"
        f"from qwen_common.errors import UserError\ntry: Model.load({str(cpu_artifact)!r})\n"
        "except UserError as error: print(error)"
    )
    found = subprocess.run([OLD_PYTHON, "-c", code], capture_output=True, text=True)
    assert "needs onnxruntime >=1.30: install it, or export with a profile for older ones" in found.stdout
