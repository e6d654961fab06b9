"""`qwen-export inspect`: what it says is what the manifest, the graphs and the kernel tables say."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result
from qwen_export.cli import main
from qwen_profiles.schema import load_profile

from benchmarks.support.artifacts import directml_profile, make_artifact
from benchmarks.support.checkpoints import TINY, TINY_MOE, TINY_VL
from tests.support.exported import Exported

EVERYWHERE = {
    **dict.fromkeys(("cpu", "cuda", "dml", "webgpu"), True),
    **dict.fromkeys(("mlx", "openvino", "nvtensorrtrtx"), None),  # their kernels are not known
}


def inspect(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


@pytest.mark.parametrize("checkpoint", [TINY, TINY_MOE, TINY_VL], ids=lambda path: path.name)
def test_a_portable_artifact_runs_everywhere_that_is_known(checkpoint: Path, exported: Exported) -> None:
    artifact = exported(checkpoint, directml_profile())
    found = json.loads(inspect(artifact, "--json").stdout)
    runs = {name: entry["runs"] for name, entry in found["providers"].items()}
    assert runs == EVERYWHERE | {"amdgpu": False}  # it has no QuickGelu
    graphs = {
        path.name: len(onnx.load(path, load_external_data=False).graph.node)
        for path in artifact.glob("*.onnx")
    }
    assert found["graphs"] == graphs
    assert found["providers"]["dml"]["covered"] == sum(found["operators"].values()) == sum(graphs.values())


@pytest.mark.parametrize("checkpoint", [TINY, TINY_MOE, TINY_VL], ids=lambda path: path.name)
def test_each_provider_is_asked_about_the_graphs_that_it_takes(checkpoint: Path, exported: Exported) -> None:
    artifact = exported(checkpoint, load_profile("strix-halo"))
    found = json.loads(inspect(artifact, "--json").stdout)
    runs = {name: entry["runs"] for name, entry in found["providers"].items()}
    # AMDGPU has no Floor, which resizes the position embeddings of images.
    assert runs == EVERYWHERE | {"amdgpu": checkpoint != TINY_VL, "nvtensorrtrtx": False}  # portable only
    alone = json.loads(inspect(exported(checkpoint, directml_profile()), "--json").stdout)
    assert found["providers"]["dml"] == alone["providers"]["dml"]
    main = sum(n for name, n in found["graphs"].items() if not {"dml", "webgpu"} & {*name.split(".")})
    assert found["providers"]["amdgpu"]["nodes"] == found["providers"]["cuda"]["nodes"] == main
    assert found["graphs"].keys() >= {"model.onnx", "model.dml.onnx", "model.webgpu.onnx"}


@pytest.mark.parametrize("checkpoint", [TINY, TINY_MOE, TINY_VL], ids=lambda path: path.name)
def test_a_fused_artifact_says_what_others_lack(checkpoint: Path, exported: Exported) -> None:
    artifact = exported(checkpoint, load_profile("cpu"))
    found = json.loads(inspect(artifact, "--json").stdout)
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert {role: entry["bytes"] for role, entry in found["roles"].items()} == manifest["bytes_by_role"]
    assert found["roles"]["attention"]["precision"] == "int8, block 128"
    assert found["providers"]["cpu"]["runs"]
    missing = {provider: entry["missing"] for provider, entry in found["providers"].items()}
    for provider in ("cuda", "dml", "webgpu"):
        entry = found["providers"][provider]
        assert not entry["runs"]
        assert entry["covered"] + sum(entry["missing"].values()) == entry["nodes"]
    assert "LinearAttention" in missing["dml"] and "LinearAttention" not in missing["cuda"]
    assert "FusedMatMul" in missing["webgpu"]
    assert ("QMoE" in missing["cuda"]) == ("QMoE" in missing["webgpu"]) == (checkpoint == TINY_MOE)
    # CUDA's GroupQueryAttention takes no float32, which this artifact has.
    assert "GroupQueryAttention" in missing["cuda"]
    shown = inspect(artifact)
    assert shown.exit_code == 0 and "LinearAttention" in shown.stdout and "int8, block 128" in shown.stdout


def test_no_large_weight_is_read_and_what_is_no_artifact_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make_artifact(TINY, load_profile("cpu"), tmp_path / "out", all_logits=False)
    data = artifact / "model.onnx.data"
    size = data.stat().st_size
    monkeypatch.setattr("qwen_common.manifest.HASHED_BYTES", size)
    data.unlink()
    with data.open("wb") as file:
        file.truncate(size)  # a hole
    assert inspect(artifact).exit_code == 0
    data.unlink()
    assert inspect(artifact).exit_code == 2
    assert "has no manifest.json" in inspect(tmp_path).stderr
    (artifact / "manifest.json").write_text("[]")
    assert "is not a JSON object" in inspect(artifact).stderr


def test_as_qwen_run_it_refuses_what_changed_and_reads_what_is_old(tmp_path: Path) -> None:
    artifact = make_artifact(TINY, load_profile("cpu"), tmp_path / "out", all_logits=False)
    manifest = json.loads((artifact / "manifest.json").read_text())
    del manifest["backend"]
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    done = inspect(artifact, "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["backend"] == "onnx"
    config = artifact / "genai_config.json"
    config.write_text(config.read_text().replace("0", "1"))  # of the same size
    done = inspect(artifact)
    assert done.exit_code == 2 and "genai_config.json changed since the export" in done.stderr
