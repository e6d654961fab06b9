"""Artifacts to the hub: its own client, without Xet, and a server that speaks the API."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import snapshot_download
from qwen_common.artifact_folder import open_folder
from qwen_export.cli.program import main

from tests.support.files import hashes
from tests.support.hub_server import COMMIT, HubServer

REPO = "my-org/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """With no repository yet."""
    (tmp_path / "repository").mkdir()
    with HubServer(tmp_path / "repository", REPO).serving() as server:
        server.exists = False
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


@pytest.fixture
def artifact(cpu_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cpu_artifact, tmp_path / "artifact"))


def push(artifact: Path, *options: str, repo: str = REPO) -> Result:
    return CliRunner().invoke(main, ["push", str(artifact), repo, *options])


def refusal(result: Result) -> str:
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    return line


def test_there_and_back(hub: HubServer, artifact: Path, tmp_path: Path) -> None:
    (artifact / "notes.md").write_text("mine")
    result = push(artifact)
    assert result.exit_code == 0, result.output
    assert "a new private repository" in result.output and COMMIT in result.output
    assert hub.visibility == "private"
    found = Path(snapshot_download(REPO, local_dir=tmp_path / "back"))
    (artifact / "notes.md").unlink()
    shutil.rmtree(found / ".cache")
    assert hashes(found) == hashes(artifact)
    open_folder(found, every=True)


def test_public(hub: HubServer, artifact: Path) -> None:
    assert push(artifact, "--public").exit_code == 0
    assert hub.visibility == "public"


def test_dry_run(hub: HubServer, artifact: Path) -> None:
    result = push(artifact, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    done = json.loads(result.stdout)
    assert done["files"] == {path.name: path.stat().st_size for path in artifact.iterdir()}
    assert (done["new"], done["commit"], hub.exists, hub.commits) == (True, None, False, [])


def test_another_artifact_in_the_same_repository(hub: HubServer, artifact: Path) -> None:
    (hub.folder / ".gitattributes").write_text("*.data filter=lfs")
    (hub.folder / "README.md").write_text("a first page")
    assert push(artifact).exit_code == 0
    assert push(artifact).exit_code == 0
    assert len(hub.commits) == 1, "nothing has changed"
    manifest = json.loads((artifact / "manifest.json").read_text())
    del manifest["files"]["LICENSE" if "LICENSE" in manifest["files"] else "chat_template.jinja"]
    gone = ({path.name for path in artifact.iterdir()} - manifest["files"].keys() - {"manifest.json"}).pop()
    (artifact / gone).unlink()
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    assert push(artifact).exit_code == 0
    assert sorted(hub.commits[1][1:]) == [f"deletedFile {gone}", "file manifest.json"]
    assert {path.name for path in hub.folder.iterdir()} == {
        ".gitattributes",
        *(path.name for path in artifact.iterdir()),
    }


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "manifest.json"])
def test_what_no_export_put_there_stays(name: str, hub: HubServer, artifact: Path) -> None:
    hub.exists = True
    (hub.folder / name).write_text("{}")
    assert f"{REPO} has {name}, which no export put there" in refusal(push(artifact))
    assert hub.commits == []


def test_what_is_no_artifact_or_a_damaged_one(hub: HubServer, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "manifest.json" in refusal(push(tmp_path / "empty"))
    with (artifact / "model.onnx.data").open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    assert "model.onnx.data" in refusal(push(artifact))
    assert not hub.exists


@pytest.mark.parametrize("repo", ["name", "a/b/c", "my-org/name@v1", "my org/na me", "../x"])
def test_names_that_are_none(repo: str, hub: HubServer, artifact: Path) -> None:
    assert "give it as org/name" in refusal(push(artifact, repo=repo))


def test_token(hub: HubServer, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    assert "HF_TOKEN gives a token that may write" in refusal(push(artifact))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert push(artifact).exit_code == 0
