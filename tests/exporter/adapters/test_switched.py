"""Adapters beside the weights: logits of PEFT's model for each that is switched on, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
import torch
from click.testing import CliRunner
from qwen_common import manifest as manifests
from qwen_common.errors import UserError
from qwen_export.adapters.switched import with_switched_adapters
from qwen_export.backends.onnx.graphs import build_graphs
from qwen_export.backends.onnx.proto import model_proto, model_size
from qwen_export.checkpoint import Checkpoint
from qwen_export.cli import main as export_main
from qwen_profiles.schema import load_profile
from qwen_runtime import Model, Sampling
from qwen_runtime.cli import main as run_main

from benchmarks.support.session import cosine
from tests.support.adapters import Adapted, make_adapted, train
from tests.support.random_checkpoints import random_model, write_random_checkpoint

IDS = list(range(5, 45))


@pytest.fixture(scope="module", params=["dense", "mixture"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    if request.param == "mixture":
        return make_adapted(tmp_path_factory.mktemp("apart"), num_experts=4)
    found: Adapted = request.getfixturevalue("adapted")
    return found


def logits_of(made: Adapted, adapter: str | None) -> np.ndarray:
    """Of PEFT's model, at every position."""
    with torch.no_grad():
        found: np.ndarray = made.model(adapter)(input_ids=torch.tensor([IDS])).logits[0].numpy()
    return found


def test_switched_in_onnx_runtime_genai(made: Adapted) -> None:
    model = og.Model(str(made.artifact))
    adapters = og.Adapters(model)
    for name in ("style", "tools"):
        adapters.load(str(made.artifact / f"{name}.onnx_adapter"), name)
    for name in ("style", None, "tools", "style"):
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=64)
        generator = og.Generator(model, parameters)
        if name:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(np.asarray(IDS, np.int32))
        found = generator.get_output("logits")[0]
        assert cosine(found, logits_of(made, name)).min() > 0.99999


def test_switched_in_the_runtime(made: Adapted) -> None:
    """States that were kept with one adapter are not gone on from with another."""
    folder = made.folder
    with Model.load(folder / "artifact", keep=2) as model:
        texts = {}
        for name in (None, "style", "tools", None, "tools", "style"):
            model.use_adapter(name)
            answer = model.generate("the river and", max_tokens=8, sampling=Sampling(temperature=0))
            answer.run()
            assert texts.setdefault(name, answer.tokens) == answer.tokens
        assert len(set(map(tuple, texts.values()))) == 3
        with pytest.raises(UserError, match="has no adapter nobody, it has style, tools"):
            model.use_adapter("nobody")


def test_the_manifest_lists_them(made: Adapted, tmp_path: Path) -> None:
    folder = made.folder
    manifest = manifests.read(folder / "artifact")
    listed = manifest["switched_adapters"]
    assert [(a["name"], a["weight"], a["file"]) for a in listed] == [
        ("style", 0.5, "style.onnx_adapter"),
        ("tools", 1.0, "tools.onnx_adapter"),
    ]
    shown = CliRunner().invoke(export_main, ["inspect", str(folder / "artifact")])
    assert shown.exit_code == 0
    assert "adapters: style (switched at run time), tools (switched at run time)" in " ".join(
        shown.stdout.split()
    )
    assert "qwen-run . --adapter style" in (folder / "artifact" / "README.md").read_text()
    other = Path(shutil.copytree(folder / "artifact", tmp_path / "other"))
    listed[0]["file"] = "../elsewhere"
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"does not list \.\./elsewhere"):
        manifests.read(other)


def test_a_damaged_file(made: Adapted, tmp_path: Path) -> None:
    """One that is too large to be hashed whenever the artifact is opened would come so far."""
    folder = made.folder
    other = Path(shutil.copytree(folder / "artifact", tmp_path / "other"))
    file = other / "style.onnx_adapter"
    with pytest.raises(UserError, match=r"style\.onnx_adapter changed since the export"):
        file.write_bytes(file.read_bytes()[:100])
        Model.load(other)
    manifest = manifests.read(other)
    manifest["files"][file.name] = manifests.file_entry(file)
    manifests.write(other, manifest)
    with pytest.raises(UserError, match="is no adapter that ONNX Runtime reads: copy the artifact again"):
        Model.load(other)


def test_the_planner_knows_the_graphs_size(made: Adapted) -> None:
    folder = made.folder
    checkpoint = Checkpoint.open(str(folder / "base"))
    checkpoint = with_switched_adapters(checkpoint, [str(folder / "style")], load_profile("cpu"))
    for graph in build_graphs(checkpoint, load_profile("cpu")).by_file.values():
        assert model_size(graph) == len(model_proto(graph).SerializeToString())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "q_proj.weight in a way that cannot be switched"),
        ({"target_modules": ["lm_head"]}, "lm_head.weight in a way that cannot be switched"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
            "input_layernorm.weight in a way",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_switched(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = Checkpoint.open(str(write_random_checkpoint(tmp_path / "base")))
    train(random_model(), tmp_path / "adapter", **config)
    with pytest.raises(UserError, match=message) as caught:
        with_switched_adapters(base, [str(tmp_path / "adapter")], load_profile("cpu"))
    assert "merge it with --adapter" in str(caught.value)


def test_names_and_profiles_that_are_refused(made: Adapted, tmp_path: Path) -> None:
    folder = made.folder
    base = Checkpoint.open(str(folder / "base"))
    with pytest.raises(UserError, match="on ONNX Runtime's CPU provider only, and profile webgpu is for"):
        with_switched_adapters(base, [str(folder / "style")], load_profile("webgpu"))
    with pytest.raises(UserError, match="two adapters are called style"):
        with_switched_adapters(base, [str(folder / "style")] * 2, load_profile("cpu"))
    odd = Path(shutil.copytree(folder / "style", tmp_path / "a b"))
    with pytest.raises(UserError, match="rename it"):
        with_switched_adapters(base, [str(odd)], load_profile("cpu"))


def test_an_artifact_without_adapters(exported: Any, tmp_path: Path) -> None:
    from benchmarks.support.checkpoints import TINY

    artifact = exported(TINY, load_profile("cpu"))
    found = CliRunner().invoke(run_main, [str(artifact), "Hello", "--adapter", "style"])
    assert found.exit_code == 2
    assert "has no adapter style, it has none: export it again with --adapter-at-runtime" in found.stderr
