"""Artifacts to an OCI registry: a small one here, and Docker's own, read by oras and skopeo too."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from oras.client import OrasClient
from qwen_common.manifest import MANIFEST
from qwen_export.cli.program import main
from qwen_runtime.cli import main as run

from tests.support.files import hashes
from tests.support.ports import free_port
from tests.support.registry_server import RegistryServer, digest_of, registry_alone
from tests.support.waiting import until

REAL = shutil.which("docker-registry")
SKOPEO = shutil.which("skopeo")


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RegistryServer]:
    with registry_alone(tmp_path / "docker", monkeypatch) as server:
        yield server


@pytest.fixture
def artifact(cpu_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cpu_artifact, tmp_path / "artifact"))


def push(artifact: Path, name: str, *options: str) -> Result:
    return CliRunner().invoke(main, ["push", str(artifact), name, *options])


def pull(name: str, folder: Path) -> Result:
    return CliRunner().invoke(run, ["pull", name, str(folder)])


def refusal(result: Result) -> str:
    assert result.exit_code == 2, result.output
    told = ("pushing: ", "127.0.0.1:")  # how far it is, and that it is tried again
    (line,) = (line for line in result.stderr.strip().splitlines() if not line.startswith(told))
    return line


def test_there_and_back(registry: RegistryServer, artifact: Path, tmp_path: Path) -> None:
    (artifact / "notes.md").write_text("mine")
    result = push(artifact, f"{registry.repository}:1")
    assert result.exit_code == 0, result.output
    digest = digest_of(registry.manifests["1"])
    assert result.stdout == f"{registry.repository}@{digest}\n"
    (artifact / "notes.md").unlink()
    assert pull(result.stdout.strip(), tmp_path / "back").exit_code == 0
    assert hashes(tmp_path / "back") == hashes(artifact)
    notes = json.loads(registry.manifests["1"])["annotations"]
    assert notes["org.opencontainers.image.title"].endswith("-cpu") and "qwen-edge" in str(notes)


def test_only_what_is_missing_is_sent(registry: RegistryServer, artifact: Path) -> None:
    """Once more, elsewhere, under another tag: it is the same digest."""
    first = json.loads(push(artifact, f"{registry.repository}:1", "--json").stdout)
    assert sorted(first["sent"]) == sorted(path.name for path in artifact.iterdir())
    before = registry.bytes_in
    second = json.loads(push(artifact, f"{registry.repository}:2", "--json").stdout)
    assert (second["digest"], second["sent"]) == (first["digest"], [])
    assert registry.bytes_in - before == len(registry.manifests["2"])


def test_dry_run(registry: RegistryServer, artifact: Path) -> None:
    result = push(artifact, f"{registry.repository}:1", "--dry-run", "--json")
    done = json.loads(result.stdout)
    assert done["files"] == {path.name: path.stat().st_size for path in artifact.iterdir()}
    assert done["pushed"] is False and not registry.blobs and not registry.manifests
    assert all(asked.startswith("HEAD ") for asked in registry.asked)
    assert "would be sent" in push(artifact, f"{registry.repository}:1", "--dry-run").stderr


def test_what_breaks_off(registry: RegistryServer, artifact: Path, tmp_path: Path) -> None:
    registry.cuts, registry.fails = 2, [500, 429]
    assert push(artifact, f"{registry.repository}:1").exit_code == 0
    assert pull(f"{registry.repository}:1", tmp_path / "back").exit_code == 0
    assert hashes(tmp_path / "back") == hashes(artifact)


def test_the_tag_comes_last(registry: RegistryServer, artifact: Path) -> None:
    registry.cuts = 6
    assert "try again later" in refusal(push(artifact, f"{registry.repository}:1"))
    assert not registry.manifests
    registry.cuts = 0
    assert push(artifact, f"{registry.repository}:1").exit_code == 0
    assert "1" in registry.manifests


def test_a_login(registry: RegistryServer, artifact: Path, tmp_path: Path) -> None:
    """With a token to read for everybody, which is no token to write; and one that lasts three requests."""
    registry.login, registry.pull_free, registry.lifetime = "me:secret", True, 3
    assert f"run docker login {registry.host}" in refusal(push(artifact, f"{registry.repository}:1"))
    assert not registry.blobs
    (tmp_path / "docker").mkdir()
    entry = {"auth": base64.b64encode(b"me:secret").decode()}
    (tmp_path / "docker" / "config.json").write_text(json.dumps({"auths": {registry.host: entry}}))
    result = push(artifact, f"{registry.repository}:1")
    assert result.exit_code == 0, result.output
    assert registry.tokens > 5 and entry["auth"] not in result.output


def test_what_is_no_artifact_or_a_damaged_one(
    registry: RegistryServer, artifact: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    assert MANIFEST in refusal(push(tmp_path / "empty", f"{registry.repository}:1"))
    with (artifact / "model.onnx.data").open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    assert "model.onnx.data" in refusal(push(artifact, f"{registry.repository}:1"))
    assert registry.asked == []


@pytest.mark.parametrize(
    "location,why", [("http://[bad", "no address"), ("file:///etc/passwd", "only https")]
)
def test_an_upload_that_leads_nowhere(
    location: str, why: str, registry: RegistryServer, artifact: Path
) -> None:
    registry.location = location
    assert why in refusal(push(artifact, f"{registry.repository}:1"))


@pytest.mark.parametrize(
    "name,options,why",
    [
        ("oci://registry.example/name", (), "neither tag nor digest"),
        (f"oci://registry.example/name@sha256:{'0a' * 32}", (), "no place to push to"),
        (f"oci://registry.example/name:1@sha256:{'0a' * 32}", (), "no place to push to"),
        ("oci://registry.example/Name:1", (), "in lower case"),
        ("oci://registry.example/name:1", ("--public",), "--public is for the hub"),
        ("my-org/name", ("--plain-http",), "--plain-http is for a registry"),
    ],
)
def test_names_that_are_none(name: str, options: tuple[str, ...], why: str, artifact: Path) -> None:
    assert why in refusal(push(artifact, name, *options))


def test_a_file_that_changes_meanwhile(
    registry: RegistryServer, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry compares what it gets with the digest."""
    from qwen_runtime.registry.registry import Registry

    has = Registry.has

    def changing(self: Registry, entry: object) -> bool:
        (artifact / "vocab.json").write_bytes(b"x" * (artifact / "vocab.json").stat().st_size)
        return has(self, entry)  # type: ignore[arg-type]

    monkeypatch.setattr(Registry, "has", changing)
    assert "DIGEST_INVALID" in refusal(push(artifact, f"{registry.repository}:1"))
    assert not registry.manifests


# `htpasswd -nbB me secret`
_ME = "me:$2y$05$mrUbtCknMg6ESr7XeKsxXuJdCnt49ha.4/SDqJq0o44QIh6jeARpe"


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=60).close()
        return True
    except OSError:
        return False


@pytest.fixture
def real(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Docker's own registry on this machine; with the parameter "login" it is open to `me` alone."""
    if REAL is None:
        pytest.skip("docker-registry is not installed")
    host = f"127.0.0.1:{free_port()}"
    (tmp_path / "registry.yml").write_text(
        f"version: 0.1\nhttp: {{addr: '{host}'}}\n"
        f"storage: {{filesystem: {{rootdirectory: '{tmp_path / 'registry'}'}}}}\n"
    )
    (tmp_path / "htpasswd").write_text(_ME)
    if getattr(request, "param", "") == "login":
        with (tmp_path / "registry.yml").open("a") as file:
            file.write(f"auth: {{htpasswd: {{realm: here, path: '{tmp_path / 'htpasswd'}'}}}}\n")
    with (tmp_path / "registry.log").open("wb") as log:
        process = subprocess.Popen([REAL, "serve", tmp_path / "registry.yml"], stdout=log, stderr=log)
    try:
        until(lambda: answers(f"http://{host}/"))
        yield host
    finally:
        process.terminate()
        process.wait()


def test_dockers_registry_and_oras(real: str, artifact: Path, tmp_path: Path) -> None:
    name = f"oci://{real}/team/tiny"
    result = push(artifact, f"{name}:1")
    assert result.exit_code == 0, result.output
    assert pull(result.stdout.strip(), tmp_path / "back").exit_code == 0
    assert hashes(tmp_path / "back") == hashes(artifact)
    OrasClient(insecure=True).pull(target=f"{real}/team/tiny:1", outdir=str(tmp_path / "oras"))
    assert hashes(tmp_path / "oras") == hashes(artifact)
    # and what oras pushes
    files = [str(path) for path in artifact.iterdir()]
    OrasClient(insecure=True).push(f"{real}/team/tiny:2", files=files, disable_path_validation=True)
    assert pull(f"{name}:2", tmp_path / "theirs").exit_code == 0
    assert hashes(tmp_path / "theirs") == hashes(artifact)
    assert "is not there" in pull(f"{name}:3", tmp_path / "none").stderr


@pytest.mark.skipif(SKOPEO is None, reason="skopeo is not installed")
def test_skopeo(real: str, artifact: Path, tmp_path: Path) -> None:
    """It copies the image to another name, and says the same digest."""
    digest = push(artifact, f"oci://{real}/team/tiny:1").stdout.strip().rpartition("@")[2]
    plain = ("--src-tls-verify=false", "--dest-tls-verify=false")
    names = (f"docker://{real}/team/tiny:1", f"docker://{real}/copy:1")
    subprocess.run([SKOPEO or "", "copy", *plain, *names], check=True, capture_output=True)
    assert pull(f"oci://{real}/copy@{digest}", tmp_path / "back").exit_code == 0
    assert hashes(tmp_path / "back") == hashes(artifact)


@pytest.mark.skipif(SKOPEO is None, reason="skopeo is not installed")
@pytest.mark.parametrize("real", ["login"], indirect=True)
def test_a_login_that_skopeo_wrote(
    real: str, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"oci://{real}/team/tiny:1"
    assert f"run docker login {real}" in refusal(push(artifact, name))
    file = tmp_path / "auth.json"
    login = [
        SKOPEO or "",
        "login",
        "--authfile",
        str(file),
        "--tls-verify=false",
        "-u",
        "me",
        "-p",
        "secret",
        real,
    ]
    subprocess.run(login, check=True, capture_output=True)
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(file))
    result = push(artifact, name)
    assert result.exit_code == 0, result.output
    assert pull(name, tmp_path / "back").exit_code == 0
    assert hashes(tmp_path / "back") == hashes(artifact)
