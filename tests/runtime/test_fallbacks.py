"""One folder for several providers: each takes the graphs that it has kernels for, over the same weights.

DirectML is not here: its graphs run on the CPU's kernels, and its record says so in place of its library.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import onnxruntime_genai as og
import pytest
from PIL import Image, ImageDraw
from qwen_common import manifest as manifests
from qwen_common.errors import UserError
from qwen_common.providers import PROVIDERS
from qwen_profiles.schema import load_profile
from qwen_runtime import Model, Sampling

from benchmarks.support.artifacts import directml_profile
from benchmarks.support.checkpoints import TINY, TINY_MOE, TINY_VL
from tests.support.exported import Exported

QUESTIONS = ["What is an iterator?", "What does the with statement do?", "How do I define a function?"]
GREEDY = Sampling(temperature=0)


@pytest.fixture
def directml(monkeypatch: pytest.MonkeyPatch) -> None:
    """DirectML in this install, with the CPU's kernels."""
    monkeypatch.setitem(PROVIDERS, "dml", replace(PROVIDERS["dml"], genai_name=None))
    monkeypatch.setattr(og, "is_dml_available", lambda: True)


def answers(model: Model) -> list[str]:
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return ["".join(model.generate(asked, max_tokens=24, sampling=GREEDY)) for asked in messages]


@pytest.mark.parametrize("checkpoint", [TINY, TINY_MOE, TINY_VL], ids=lambda path: path.name)
def test_one_folder_answers_alike(checkpoint: Path, exported: Exported, directml: None) -> None:
    artifact = exported(checkpoint, load_profile("strix-halo"))
    with Model.load(artifact, "cpu") as model:
        expected = answers(model)
        assert model.info.reason == "CPU: asked for"
    with Model.load(artifact) as model:
        assert model.info.reason == (
            "DirectML: AMDGPU is not in this install (amdgpu-ep of github.com/ROCm/hip-ep has it); "
            "WebGPU is not in this install (onnxruntime-ep-webgpu has it); with the portable graph"
        )
        assert answers(model) == expected
    assert all(len(answer) > 10 for answer in expected) or checkpoint == TINY_VL


@pytest.mark.parametrize("checkpoint", [TINY, TINY_MOE, TINY_VL], ids=lambda path: path.name)
def test_a_further_graph_costs_its_own_size(checkpoint: Path, exported: Exported) -> None:
    def size(artifact: Path) -> int:
        return sum(path.stat().st_size for path in artifact.iterdir())

    both = exported(checkpoint, load_profile("strix-halo"))
    dml, webgpu = (
        exported(checkpoint, profile)
        for profile in (directml_profile(), load_profile("strix-halo", ["provider=webgpu", "fallbacks=[]"]))
    )
    graphs = sum(path.stat().st_size for path in webgpu.glob("*.onnx"))
    print(f"{checkpoint.name}: {size(both)} bytes, apart {size(dml)} and {size(webgpu)}")
    assert size(both) < 1.05 * max(size(dml), size(webgpu)) + 2.1 * graphs  # WebGPU's, and AMDGPU's
    data = {artifact: (artifact / "model.onnx.data").read_bytes() for artifact in (both, dml)}
    assert data[both] == data[dml]


def test_a_picture_goes_through_the_further_graphs(exported: Exported, directml: None) -> None:
    image = Image.new("RGB", (128, 96), "white")
    ImageDraw.Draw(image).ellipse((20, 20, 60, 60), fill="red")
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "How many circles are there?"}]
    artifact, asked = exported(TINY_VL, load_profile("strix-halo")), [{"role": "user", "content": parts}]
    found = []
    for provider in ("cpu", "dml"):
        with Model.load(artifact, provider) as model:
            found.append("".join(model.generate(asked, max_tokens=12, sampling=GREEDY)))
    assert found[0] == found[1] and found[0]


def test_the_length_of_a_prompt_with_images_is_the_graphs_own(exported: Exported, directml: None) -> None:
    """The portable graph takes it in one run, which has a limit; the fused one does not."""
    image = {"type": "image", "image": Image.new("RGB", (256, 256), "white")}
    asked = [{"role": "user", "content": [*[image] * 10, {"type": "text", "text": "What is this?"}]}]
    artifact = exported(TINY_VL, load_profile("strix-halo"))
    found = {}
    for provider in ("cpu", "dml"):
        with Model.load(artifact, provider) as model:
            found[provider] = model.generate(asked, max_tokens=1, sampling=GREEDY).prompt_tokens
    assert found["cpu"] > 600 and 400 < found["dml"] <= 512


def test_each_provider_opens_its_own_graph(exported: Exported, directml: None, tmp_path: Path) -> None:
    """Whichever file is no graph, only those that take it fail."""
    for file, provider in ("model.onnx", "dml"), ("model.dml.onnx", "cpu"):
        artifact = shutil.copytree(exported(TINY, load_profile("strix-halo")), tmp_path / provider)
        manifests.put_files(artifact, manifests.read(artifact), {file: b""})
        with Model.load(artifact, provider) as model:
            assert model.info.provider == provider
        other = {"dml": "cpu", "cpu": "dml"}[provider]
        with pytest.raises((UserError, RuntimeError)):
            Model.load(artifact, other)


def test_an_artifact_without_further_graphs_loads_as_before(exported: Exported, directml: None) -> None:
    artifact = exported(TINY, directml_profile())
    assert "further_graphs" not in manifests.read(artifact)
    with Model.load(artifact) as model:
        assert model.info.reason == "DirectML: the artifact was made for it"


def test_fallbacks_are_tried_in_their_order(exported: Exported) -> None:
    """This install has neither."""
    for fallbacks, names in (["dml", "cuda"], ["DirectML", "CUDA"]), (["cuda", "dml"], ["CUDA", "DirectML"]):
        profile = load_profile("strix-halo", [f"fallbacks={fallbacks}"])
        with Model.load(exported(TINY, profile)) as model:
            said = model.info.reason.split("; ")
            assert [name in line for name, line in zip(["AMDGPU", *names], said, strict=True)] == [True] * 3


def test_weights_that_two_providers_want_in_two_forms(exported: Exported) -> None:
    """The CPU has an operator for experts, which takes them otherwise than DirectML's products."""
    with pytest.raises(UserError, match="in two forms, so one folder cannot serve both"):
        exported(TINY_MOE, load_profile("cpu", ['fallbacks=["dml"]']))


def test_a_further_graph_that_is_not_listed(exported: Exported, tmp_path: Path) -> None:
    artifact = shutil.copytree(exported(TINY, load_profile("strix-halo")), tmp_path / "copy")
    manifest = manifests.read(artifact)
    for name in ("genai_config.dml.json", "model.dml.onnx"):
        files = {file: entry for file, entry in manifest["files"].items() if file != name}
        manifests.write(artifact, {**manifest, "files": files})
        with pytest.raises(UserError, match=f"does not list {name}"):
            Model.load(artifact)
