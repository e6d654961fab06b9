"""The planner: what it predicts is what an export writes and a process takes, and what does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.cli import main
from qwen_export.planner.models import configured, family
from qwen_export.planner.predictions import predict, shipped_profiles
from qwen_profiles.schema import load_profile

from benchmarks.support.checkpoints import TINY, TINY_MOE, TINY_VL
from tests.support.exported import Exported


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def config_alone(checkpoint: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text((checkpoint / "config.json").read_text())
    return folder


@pytest.mark.parametrize("checkpoint", [TINY, TINY_MOE, TINY_VL], ids=lambda path: path.name)
@pytest.mark.parametrize("profile", ["cpu", "strix-halo", "nvidia-rtx-8gb"])
def test_predicted_size_is_the_size(checkpoint: Path, profile: str, exported: Exported) -> None:
    predicted = predict(configured(str(checkpoint)), load_profile(profile)).estimate
    artifact = exported(checkpoint, load_profile(profile))
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert predicted is not None
    assert predicted.disk == pytest.approx(sum(f.stat().st_size for f in artifact.iterdir()), rel=0.01)
    assert predicted.by_role == manifest["bytes_by_role"]
    assert predicted.cache_per_token == manifest["cache_bytes_per_token"]
    assert predicted.context == manifest["context_length"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("checkpoint", [TINY, TINY_MOE, TINY_VL], ids=lambda path: path.name)
def test_predicted_memory_at_load_is_what_a_process_takes(checkpoint: Path, exported: Exported) -> None:
    """Of these small models nearly all is the runtime's own; benchmarks/plan.py has 0.8B and 4B."""
    profile = load_profile("cpu")
    predicted = predict(configured(str(checkpoint)), profile).estimate
    artifact = exported(checkpoint, profile)
    code = (
        "import sys; from qwen_runtime import Model; model = Model.load(sys.argv[1]);"
        "print(*(line for line in open('/proc/self/status') if line.startswith(('VmHWM', 'VmRSS'))))"
    )
    output = subprocess.check_output([sys.executable, "-c", code, artifact], text=True).split()
    assert predicted is not None
    peak, after = (1024 * int(output[output.index(key) + 1]) for key in ("VmHWM:", "VmRSS:"))
    assert predicted.load == pytest.approx(peak, rel=0.1)
    assert predicted.resident == pytest.approx(after, rel=0.1)


def test_only_config_json_is_read(tmp_path: Path) -> None:
    done = run("plan", config_alone(TINY_MOE, tmp_path / "m"), "--profile", "cpu", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["precision"]["experts"] == "int4/32"


def test_a_mixture_reads_its_active_experts_only() -> None:
    model, profile = family()["Qwen3.5-35B-A3B"], load_profile("strix-halo")
    found = predict(model, profile).estimate
    assert found is not None
    experts, active = found.by_role["experts"], model.config.num_experts_per_tok
    assert model.config.num_experts is not None
    unread = found.by_role["embedding"] + experts - experts * active // model.config.num_experts
    assert found.decode_bytes == pytest.approx(sum(found.by_role.values()) - unread, rel=0.001)
    assert found.decode_rate == pytest.approx(256e9 / found.decode_bytes)


def test_what_does_not_fit_is_refused_with_advice() -> None:
    refused = run("plan", "--profile", "intel-n100", "Qwen3.5-27B")
    assert refused.exit_code == 2
    assert "memory at load" in refused.stdout
    needed = predict(family()["Qwen3.5-27B"], load_profile("intel-n100")).estimate
    assert needed is not None and not needed.fits and needed.largest_context == 0
    assert refused.stderr.startswith(
        f"error: Qwen3.5-27B needs {needed.needed / 1e9:.1f} GB and profile intel-n100 has 6.0: try Qwen3.5-"
    )
    assert "--profile" in refused.stderr and refused.stderr.count("\n") == 1
    advised = refused.stderr.split("try ")[1].split(",")[0]
    assert run("plan", "--profile", "intel-n100", advised).exit_code == 0


def test_largest_context_is_the_edge_of_what_fits() -> None:
    found = predict(family()["Qwen3.5-9B"], load_profile("cpu-avx2")).estimate
    assert found is not None and found.context < found.largest_context < 262144
    used = found.resident + found.working + found.largest_context * found.cache_per_token
    assert used <= found.budget < used + found.cache_per_token


def test_the_profile_for_laptops_is_for_35b_beside_other_programs() -> None:
    model = family()["Qwen3.5-35B-A3B"]
    assert predict(model, load_profile("laptop-32gb")).reason is None
    small = predict(model, load_profile("laptop-16gb"))
    assert small.reason is None and small.estimate.needed < 12.5e9
    assert small.estimate.precision["experts"] == "int2/128"
    assert predict(model, load_profile("cpu", ["hardware.memory_budget_gb=24"])).reason is not None


def test_export_checks_memory_first(tmp_path: Path) -> None:
    arguments = [TINY, "--profile", "cpu", "--set", "hardware.memory_budget_gb=0.01", "-o", tmp_path / "out"]
    refused = run(*arguments)
    assert refused.exit_code == 2 and "tiny-dense needs 0.1 GB" in refused.stderr
    assert not any(tmp_path.iterdir())
    assert run(*arguments, "--ignore-memory", "--no-progress", "--no-verify").exit_code == 0


def test_a_context_that_does_not_fit_is_said(tmp_path: Path) -> None:
    found = predict(configured(str(TINY)), load_profile("cpu")).estimate
    assert found is not None
    budget = (found.resident + found.working + 4000 * found.cache_per_token) / 1e9
    arguments = [
        TINY,
        "--profile",
        "cpu",
        "--set",
        f"hardware.memory_budget_gb={budget}",
        "--no-progress",
        "--no-verify",
    ]
    done = run(*arguments, "-o", tmp_path / "out")
    assert done.exit_code == 0
    assert "note: a context of 8192 tokens does not fit cpu's memory, " in done.stderr
    assert "consider --max-context 3999" in done.stderr or "consider --max-context 4000" in done.stderr
    quiet = run(*arguments, "-o", tmp_path / "short", "--max-context", "2048")
    assert quiet.exit_code == 0 and "does not fit" not in quiet.stderr


def test_a_context_that_the_checkpoint_does_not_have() -> None:
    line = "note: the context is 8192 tokens, the checkpoint's own limit, and not 98304: "
    assert line in run("plan", TINY, "--profile", "cpu", "--set", "context_length=98304").stderr
    assert not run("plan", TINY, "--profile", "cpu", "--set", "context_length=8192").stderr


def test_comparisons() -> None:
    profiles, models = [profile.name for profile in shipped_profiles()], list(family())
    by_profile = json.loads(run("plan", "Qwen3.5-4B", "--json").stdout)
    assert [row["profile"] for row in by_profile] == profiles
    by_model = json.loads(run("plan", "--profile", "strix-halo", "--json").stdout)
    assert [row["model"] for row in by_model] == models
    assert all(row["fits"] for row in by_model)
    assert all("load" in row for row in by_profile)
    for arguments in (["plan"], ["plan", "Qwen3.5-4B"], ["plan", "--profile", "strix-halo"], ["profiles"]):
        shown = run(*arguments)
        assert shown.exit_code == 0 and "strix-halo" in shown.stdout
    assert [profile["name"] for profile in json.loads(run("profiles", "--json").stdout)] == profiles


def test_what_cannot_be_planned_is_named(tmp_path: Path) -> None:
    assert "no folder nowhere: give a checkpoint folder" in run("plan", "nowhere").stderr
    assert "--set changes one profile" in run("plan", "Qwen3.5-4B", "--set", "context_length=1").stderr
    assert "no profile 'cpux'" in run("plan", "Qwen3.5-4B", "--profile", "cpux").stderr
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "model type 'llama' is not supported" in run("plan", tmp_path).stderr


def test_family_and_checkpoint_plan_alike(tmp_path: Path) -> None:
    """A checkpoint opened with its weights is predicted as its configuration alone."""
    opened, alone = Checkpoint.open(str(TINY_VL)), configured(str(config_alone(TINY_VL, tmp_path / "c")))
    profile = load_profile("cpu")
    first, second = predict(opened, profile).estimate, predict(alone, profile).estimate
    assert first and second and first.by_role == second.by_role and first.load == second.load
