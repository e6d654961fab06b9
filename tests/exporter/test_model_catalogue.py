"""`qwen-export catalog`: what it writes is what Windows ML's documentation of the format asks for.

`tests/support/model_catalogue.schema.json` holds the rules of that page's JSON schema (of February 2026), but
for packages, which are not written. Windows itself has read none of it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from jsonschema import Draft202012Validator
from qwen_common import manifest as manifests
from qwen_export.cli import main
from qwen_profiles.schema import load_profile

from benchmarks.support.checkpoints import TINY
from tests.support.exported import Exported

SCHEMA = json.loads((Path(__file__).parents[1] / "support" / "model_catalogue.schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA, format_checker=Draft202012Validator.FORMAT_CHECKER)
OPTIONS = {
    "--base-url": "https://example.com/models/",
    "--publisher": "Example Ltd",
    "--license": "Apache-2.0",
    "--license-uri": "https://www.apache.org/licenses/LICENSE-2.0",
}


def run(*artifacts: Path, **changed: str) -> Result:
    options = OPTIONS | {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
    return CliRunner().invoke(
        main, ["catalog", *map(str, artifacts), *(x for item in options.items() for x in item)]
    )


@pytest.fixture
def gpu_artifact(exported: Exported) -> Path:
    return exported(TINY, load_profile("strix-halo"))


def test_the_schema_can_fail() -> None:
    good = {"name": "model.onnx", "sha256": "0" * 64}
    model = dict.fromkeys(SCHEMA["$defs"]["Model"]["required"], "x") | {
        "executionProviders": [{"name": "CPUExecutionProvider"}],
        "licenseUri": "https://example.com",
        "uri": "https://example.com",
        "files": [good],
    }
    assert VALIDATOR.is_valid({"models": [model]})
    for wrong in (
        {"files": [good | {"sha256": "0" * 63}]},
        {"uri": "no address"},
        {"packages": []},
        {"executionProviders": ["CPUExecutionProvider"]},
        {"modelSizeBytes": -1},
    ):
        assert not VALIDATOR.is_valid({"models": [model | wrong]})


def test_a_catalogue_of_two_variants(gpu_artifact: Path, cpu_artifact: Path, tmp_path: Path) -> None:
    output = tmp_path / "catalog.json"
    done = run(gpu_artifact, cpu_artifact, output=str(output))
    assert done.exit_code == 0 and done.stdout == ""
    found = json.loads(output.read_text())
    VALIDATOR.validate(found)
    gpu, cpu = found["models"]
    assert (gpu["id"], cpu["id"]) == ("tiny-dense-strix-halo", "tiny-dense-cpu")
    assert gpu["name"] == cpu["name"] == "tiny-dense"
    names = [provider["name"] for provider in gpu["executionProviders"]]
    # The CPU is the other variant's.
    assert names == ["AMDGPUExecutionProvider", "WebGpuExecutionProvider", "DmlExecutionProvider"]
    assert cpu["executionProviders"] == [{"name": "CPUExecutionProvider"}]
    for artifact, model in (gpu_artifact, gpu), (cpu_artifact, cpu):
        files = {path.name: path.read_bytes() for path in artifact.iterdir()}
        assert {file["name"]: file["sha256"] for file in model["files"]} == {
            name: hashlib.sha256(content).hexdigest() for name, content in files.items()
        }
        assert model["modelSizeBytes"] == sum(map(len, files.values()))
        assert model["uri"] == f"https://example.com/models/{artifact.name}"
        assert all(file["uri"] == f"{model['uri']}/{file['name']}" for file in model["files"])
        assert (model["publisher"], model["version"], model["license"]) == (
            "Example Ltd",
            "1.0.0",
            "Apache-2.0",
        )


def test_one_artifact_alone_is_for_the_cpu_too_and_its_licence_is_in_it(
    gpu_artifact: Path, tmp_path: Path
) -> None:
    artifact = shutil.copytree(gpu_artifact, tmp_path / "with a space")
    manifests.put_files(artifact, manifests.read(artifact), {"LICENSE": b"As you like it.\n"})
    done = run(artifact)
    found = json.loads(done.stdout)
    VALIDATOR.validate(found)
    (model,) = found["models"]
    assert model["executionProviders"][-1] == {"name": "CPUExecutionProvider"}
    assert model["licenseText"] == "As you like it.\n"
    assert model["uri"] == "https://example.com/models/with%20a%20space"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"base_url": "http://example.com"}, "--base-url 'http://example.com' is no https address"),
        ({"base_url": "https://"}, "--base-url 'https://' is no https address"),
        ({"base_url": "https://example.com/a b"}, "is no https address"),
        ({"base_url": "https://example.com/100%"}, "is no https address"),
        ({"base_url": "https://example.com/m?key=1"}, "--base-url must end in a folder, without '?' or '#'"),
        ({"base_url": "https://example.com/m#top"}, "--base-url must end in a folder, without '?' or '#'"),
        ({"base_url": "https://me:word@example.com/m"}, "--base-url holds a user's name or password"),
        ({"license_uri": "LICENSE"}, "--license-uri 'LICENSE' is no https address"),
        ({"publisher": " "}, "'publisher' of the catalogue: String should have at least 1 character"),
        ({"version": ""}, "'version' of the catalogue"),
    ],
)
def test_wrong_options(changed: dict[str, str], message: str, cpu_artifact: Path) -> None:
    done = run(cpu_artifact, **changed)
    assert done.exit_code == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["..", "a\nb", "x\u202ey", 'a"b', "a:b", "n" * 5000, "", " "])
def test_names_that_no_catalogue_should_have(name: str, cpu_artifact: Path, tmp_path: Path) -> None:
    artifact = shutil.copytree(cpu_artifact, tmp_path / "artifact")
    manifest = manifests.read(artifact)
    manifests.write(artifact, {**manifest, "model": {**manifest["model"], "name": name}})
    done = run(artifact)
    assert done.exit_code == 2 and done.stdout == ""
    assert f"{artifact} has a model's name that " in done.stderr and done.stderr.count("\n") == 1


def test_names_of_other_scripts_are_published(cpu_artifact: Path, tmp_path: Path) -> None:
    artifact = shutil.copytree(cpu_artifact, tmp_path / "artifact")
    manifest = manifests.read(artifact)
    manifests.write(artifact, {**manifest, "model": {**manifest["model"], "name": "Über/模型-3.5 (2)"}})
    assert json.loads(run(artifact).stdout)["models"][0]["name"] == "模型-3.5 (2)"


def test_what_cannot_be_published(cpu_artifact: Path, tmp_path: Path) -> None:
    done = run(cpu_artifact, cpu_artifact)
    assert done.exit_code == 2 and "two artifacts have the id tiny-dense-cpu" in done.stderr
    output = tmp_path / "catalog.json"
    output.write_text("mine")
    done = run(cpu_artifact, output=str(output))
    assert done.exit_code == 2 and "already exists" in done.stderr and output.read_text() == "mine"
    damaged = shutil.copytree(cpu_artifact, tmp_path / "damaged")
    data = damaged / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\x00")
    done = run(damaged)
    assert done.exit_code == 2 and "changed since the export" in done.stderr


def test_large_files_are_named(cpu_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_export.model_catalogue.LARGE_BYTES", 10**6)
    done = run(cpu_artifact)
    assert done.exit_code == 0
    assert "tiny-dense-cpu: model.onnx.data has more than 1 GB" in done.stderr
