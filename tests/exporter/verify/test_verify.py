"""Verification: its figures against transformers', what it blames, and what it leaves in the artifact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from qwen_common import files
from qwen_common.errors import BELOW_THE_BAR, USER_ERROR, UserError
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.cli import main
from qwen_export.verify import verification
from qwen_export.verify.verification import verify
from qwen_profiles.schema import ROLES, Profile, load_profile
from qwen_runtime import Model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.support.artifacts import Quiet, float_profile, make_artifact
from benchmarks.support.checkpoints import EVALUATION, TINY, TINY_MOE


def exported(checkpoint: Path, profile: Profile, folder: Path) -> Path:
    return make_artifact(checkpoint, profile, folder / "artifact", all_logits=False)


def damaged(folder: Path, part: str) -> Path:
    """The trained checkpoint with the matrices of `part` scaled by 30."""
    shutil.copytree(TINY, folder)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if part in name and weight.ndim == 2:
            weights[name] = (weight.astype(np.float32) * 30).astype(weight.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("checkpoint", [TINY, TINY_MOE], ids=lambda path: path.name)
@pytest.mark.parametrize("lowering", ["fused", "portable"])
def test_an_exact_artifact_loses_nothing(checkpoint: Path, lowering: str, tmp_path: Path) -> None:
    artifact = exported(checkpoint, float_profile(lowering), tmp_path)
    report = verify(artifact, Checkpoint.open(str(checkpoint)), Quiet(), tokens=256)
    assert report["passed"]
    assert report["run"]["kl_divergence"] < 1e-6
    assert report["run"]["top1_agreement"] == 1
    assert report["run"]["perplexity"] == pytest.approx(report["reference"]["perplexity"], rel=1e-4)


@pytest.mark.parametrize("form", ["symmetric = true", "symmetric = false"])
def test_int2_is_read_back_as_the_kernels_read_it(form: str, tmp_path: Path) -> None:
    """Every role in 2 bits, the looked-up embedding too: what runs loses what its stored weights lose."""
    roles = [f"weights.{role}={{precision = 'int2', block_size = 32, {form}}}" for role in ROLES]
    profile = load_profile("cpu", ["accuracy_level=0", *roles])
    artifact = exported(TINY, profile, tmp_path)
    report = verify(artifact, Checkpoint.open(str(TINY)), Quiet(), tokens=256)
    assert report["weights"]["kl_divergence"] > 0.5
    assert report["run"]["kl_divergence"] == pytest.approx(report["weights"]["kl_divergence"], rel=1e-4)
    assert all(role["precision"].startswith("int2") for role in report["roles"] if role["kl_divergence"])
    assert report["findings"][-1].endswith("=int4 would spare most of it.")


def test_figures_are_those_of_transformers(tmp_path: Path) -> None:
    """KL divergence, agreement and perplexity of the INT4 artifact, computed anew with transformers."""
    artifact = exported(TINY, load_profile("cpu"), tmp_path)
    report = verify(artifact, Checkpoint.open(str(TINY)), Quiet(), tokens=512, text=EVALUATION)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    divergences, agreements, nlls = [], [], []
    with Model.load(artifact) as runtime:
        ids = runtime.encode(EVALUATION.read_text(encoding="utf-8"))
        for start in (0, 256):
            text = ids[start : start + 256]
            with torch.no_grad():
                expected = torch.log_softmax(model(torch.tensor([text])).logits[0, 159:], -1)
            found = torch.log_softmax(torch.tensor(np.stack(list(runtime.score(text, 160)))), -1)
            divergences += (expected.exp() * (expected - found)).sum(-1).tolist()
            agreements += (expected.argmax(-1) == found.argmax(-1)).tolist()
            nlls += (-found[np.arange(96), text[160:]]).tolist()
    assert report["text"]["positions"] == len(divergences) == 2 * 97
    assert report["run"]["kl_divergence"] == pytest.approx(np.mean(divergences), rel=1e-3)
    assert report["run"]["top1_agreement"] == pytest.approx(np.mean(agreements))
    assert report["run"]["perplexity"] == pytest.approx(np.exp(np.mean(nlls)), rel=1e-4)
    assert report["weights"]["kl_divergence"] == pytest.approx(report["run"]["kl_divergence"], rel=0.2)


def test_the_costliest_role_is_the_one_in_int4(tmp_path: Path) -> None:
    profile = load_profile("cpu", ["weights.mlp=int8", "weights.attention=int4", "weights.lm_head=int8"])
    artifact = exported(TINY, profile, tmp_path)
    report = verify(artifact, Checkpoint.open(str(TINY)), Quiet(), tokens=256)
    costs = {role["role"]: role["kl_divergence"] or 0 for role in report["roles"]}
    assert max(costs, key=costs.__getitem__) == "attention"
    assert report["findings"][0].startswith("The role that costs most is attention")


@pytest.mark.parametrize(
    ("part", "layer", "role"),
    [
        ("layers.5.", 5, "mlp"),
        ("layers.3.self_attn", 3, "attention"),
        ("layers.1.lin", 1, "linear_attention"),
    ],
)
def test_a_damaged_layer_is_named(part: str, layer: int, role: str, tmp_path: Path) -> None:
    """The artifact of a checkpoint with one layer's weights scaled by 30, against the healthy one."""
    artifact = exported(damaged(tmp_path / "damaged", part), load_profile("cpu"), tmp_path)
    arguments = ["verify", str(artifact), "--against", str(TINY), "--tokens", "256"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == BELOW_THE_BAR
    report = json.loads((artifact / "report.json").read_text())
    assert not report["passed"]
    assert report["findings"][0].startswith(f"Layer {layer} is not the checkpoint's: its {role} weights")
    assert "BELOW THE BAR" in result.stdout
    assert "BELOW THE BAR" in (artifact / "REPORT.md").read_text()
    assert "Below the profile's bar" in (artifact / "README.md").read_text()
    Model.load(artifact, verify=True).close()  # kept, and whole


def test_a_layer_that_is_damaged_in_the_checkpoint_too_is_named(tmp_path: Path) -> None:
    """Exported from the damaged checkpoint and compared with it: INT4's errors count for more there."""
    folder = damaged(tmp_path / "damaged", "layers.5.")
    output = tmp_path / "artifact"
    result = CliRunner().invoke(main, ["--profile", "cpu", str(folder), "-o", str(output)])
    assert result.exit_code == BELOW_THE_BAR, result.output
    report = json.loads((output / "report.json").read_text())
    assert report["findings"][0].startswith("Layer 5 of the checkpoint makes its hidden states")
    assert "--set weights.mlp=int8" in report["findings"][1]


def test_export_leaves_a_report_that_the_manifest_lists(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    result = CliRunner().invoke(main, ["--profile", "cpu", str(TINY), "-o", str(output), "--json"])
    assert result.exit_code == 0, result.output
    verification = json.loads(result.stdout)["verification"]
    assert verification == json.loads((output / "report.json").read_text())
    assert verification["run"]["provider"] == "cpu"
    listed = json.loads((output / "manifest.json").read_text())["files"]
    written = {path.name for path in output.iterdir()}
    assert written == {*listed, "manifest.json"}
    images = {name for name in written if name.endswith(".png")}
    assert images == {f"report-{name}.png" for name in ("kl-by-position", "roles", "layers", "speed")}
    assert all((output / name).read_bytes().startswith(b"\x89PNG") for name in images)
    for name in images:
        assert f"]({name})" in (output / "REPORT.md").read_text()
    assert f"{verification['run']['kl_divergence']:.4f}" in (output / "README.md").read_text()
    Model.load(output, verify=True).close()


def test_export_without_verification_says_so(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    result = CliRunner().invoke(main, ["--profile", "cpu", str(TINY), "-o", str(output), "--no-verify"])
    assert result.exit_code == 0, result.output
    assert not (output / "report.json").exists()
    assert "Not verified" in (output / "README.md").read_text()


def test_stopped_while_the_report_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any of the writes: the artifact stays valid."""
    artifact = exported(TINY, load_profile("cpu"), tmp_path)
    checkpoint = Checkpoint.open(str(TINY))
    replace = files.replace
    drawn = verification.plots(verify(artifact, checkpoint, Quiet(), tokens=256))
    monkeypatch.setattr(verification, "plots", lambda report: drawn)  # drawing is not what is stopped
    for stop in range(8):
        writes = iter(range(stop))

        def interrupted(path: Path, content: bytes, writes=writes) -> None:
            if next(writes, None) is None:
                raise KeyboardInterrupt
            replace(path, content)

        monkeypatch.setattr(files, "replace", interrupted)
        manifest = json.loads((artifact / "manifest.json").read_text())
        report = json.loads((artifact / "report.json").read_text())
        with pytest.raises(KeyboardInterrupt):
            verification._put_into(artifact, manifest, {**report, "created": f"attempt {stop}"})
        Model.load(artifact, verify=True).close()


def test_too_little_memory_to_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the weights alone are judged."""
    artifact = exported(TINY, load_profile("cpu"), tmp_path)
    monkeypatch.setattr(verification, "_too_large", lambda *_: "it needs 80 GB of memory")
    notes = Quiet()
    report = verify(artifact, Checkpoint.open(str(TINY)), notes, tokens=256)
    assert report["passed"]
    assert report["run"] is None
    assert "it needs 80 GB of memory" in notes.notes[0]
    assert "It was not run: it needs 80 GB of memory" in (artifact / "REPORT.md").read_text()
    assert "weights alone" in (artifact / "README.md").read_text()
    assert not (artifact / "report-speed.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {}}, "exported by another version of qwen-edge"),
        ({"settings": None}, "has no valid 'settings'"),
        ({"format_version": 99}, "artifact format 99"),
    ],
)
def test_other_versions(change: dict, message: str, tmp_path: Path) -> None:
    artifact = exported(TINY, load_profile("cpu"), tmp_path)
    manifest = json.loads((artifact / "manifest.json").read_text())
    (artifact / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=message):
        verify(artifact, Checkpoint.open(str(TINY)), Quiet())


def test_mistakes(tmp_path: Path) -> None:
    artifact = exported(TINY, load_profile("cpu"), tmp_path)
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\xfd")
    against = ["--against", str(TINY)]
    mute = exported(TINY, load_profile("cpu"), tmp_path / "mute")
    manifest = json.loads((mute / "manifest.json").read_text())
    (mute / "tokenizer.json").unlink()
    del manifest["files"]["tokenizer.json"]
    (mute / "manifest.json").write_text(json.dumps(manifest))
    cases = {
        "has no tokenizer.json": ["verify", str(mute), *against],
        "is it for another model": ["verify", str(artifact), "--against", str(TINY_MOE)],
        "give a text of 256": ["verify", str(artifact), *against, "--text", str(short)],
        "as UTF-8": ["verify", str(artifact), *against, "--text", str(binary)],
        "no manifest.json": ["verify", str(tmp_path), *against],
        "DirectML has no kernels for the artifact's graph": [
            "verify",
            str(artifact),
            *against,
            "--provider",
            "dml",
        ],
    }
    for message, arguments in cases.items():
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == USER_ERROR, (message, result.output)
        if message != "is it for another model":
            assert message in result.output
