"""`qwen-run pull` from a registry and over networks that do what they may do."""

from __future__ import annotations

import base64
import json
import os
import shutil
import ssl
import subprocess
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from filelock import FileLock
from qwen_common.artifact_folder import open_folder
from qwen_runtime.cli import main

from tests.support.files import hashes
from tests.support.registry_server import RegistryServer, digest_of

Layers = list[tuple[Any, bytes]]


@pytest.fixture
def layers(cpu_artifact: Path) -> Layers:
    return [(path.name, path.read_bytes()) for path in sorted(cpu_artifact.iterdir())]


@pytest.fixture
def pushed(registry: RegistryServer, layers: Layers) -> str:
    """The digest of an artifact that is there as `1`."""
    return registry.put("1", layers)


def pull(registry: RegistryServer, folder: Path, *options: str, version: str = ":1") -> Result:
    return CliRunner().invoke(main, ["pull", registry.repository + version, str(folder), *options])


def refusal(result: Result) -> str:
    assert result.exit_code == 2, result.output
    told = ("pulling: ", "127.0.0.1:")  # how far it is, and that it is tried again
    (line,) = (line for line in result.stderr.strip().splitlines() if not line.startswith(told))
    return line


def work(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.partial"


def staging(folder: Path, digest: str) -> Path:
    """Where a pull of `digest` into `folder` was stopped."""
    staged = work(folder) / "pulled"
    staged.mkdir(parents=True)
    (staged.parent / "lock").touch()
    (staged.parent / "digest").write_text(digest)
    return staged


def without_manifest(layers: Layers, name: str) -> bytes:
    """A manifest.json that does not list a file."""
    content = json.loads(dict(layers)["manifest.json"])
    del content["files"][name]
    return json.dumps(content).encode()


def test_by_tag_and_by_digest(
    registry: RegistryServer, pushed: str, cpu_artifact: Path, tmp_path: Path
) -> None:
    result = pull(registry, tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{registry.repository}@{pushed}\n"
    assert hashes(tmp_path / "a") == hashes(cpu_artifact)
    open_folder(tmp_path / "a", every=True)
    registry.put("1", [("manifest.json", b"{}")])  # the tag moves on
    done = json.loads(pull(registry, tmp_path / "deep" / "b", "--json", version=f":1@{pushed}").stdout)
    assert hashes(tmp_path / "deep" / "b") == hashes(cpu_artifact)
    assert (done["digest"], done["new"]) == (pushed, True)
    assert done["fetched"] == sum(done["files"].values()) - done["files"]["manifest.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "deep"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["b"]


def test_a_tag_is_looked_up_once(registry: RegistryServer, pushed: str, tmp_path: Path) -> None:
    assert pull(registry, tmp_path / "a").exit_code == 0
    assert [asked for asked in registry.asked if "/manifests/" in asked] == ["GET /v2/team/tiny/manifests/1"]


def test_the_same_again(registry: RegistryServer, pushed: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert pull(registry, tmp_path / "a").exit_code == 0
    (tmp_path / "a" / "notes.md").write_text("mine")
    before = registry.bytes_out
    assert json.loads(pull(registry, tmp_path / "a", "--json").stdout)["new"] is False
    assert registry.bytes_out == before and (tmp_path / "a" / "notes.md").read_text() == "mine"
    (tmp_path / "a" / "genai_config.json").write_text("{}")
    assert "mend it with --force" in refusal(pull(registry, tmp_path / "a"))


def test_what_is_there_stays(registry: RegistryServer, layers: Layers, pushed: str, tmp_path: Path) -> None:
    """A folder of somebody's, another artifact, a file, and links to them."""
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "other" / "manifest.json").write_bytes(without_manifest(layers, "vocab.json"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = hashes(tmp_path)
    for name in ("mine", "other"):
        assert "has something else than oci://" in refusal(pull(registry, tmp_path / name))
    for name in ("file", "link", "dangling"):
        assert "is a link or a file" in refusal(pull(registry, tmp_path / name))
    assert "Not a directory" in refusal(pull(registry, tmp_path / "file" / "a"))
    assert hashes(tmp_path) == before and not work(tmp_path / "mine").exists()


def test_another_version_in_its_place(
    registry: RegistryServer, layers: Layers, pushed: str, cpu_artifact: Path, tmp_path: Path
) -> None:
    """Only what changed is fetched; a folder with something of somebody's stays."""
    folder = tmp_path / "a"
    assert pull(registry, folder).exit_code == 0
    new = dict(layers)
    new["chat_template.jinja"] += b"{# new #}"
    manifest = json.loads(new["manifest.json"])
    manifest["files"]["chat_template.jinja"] = {
        "size": len(new["chat_template.jinja"]),
        "sha256": digest_of(new["chat_template.jinja"])[7:],
    }
    new["manifest.json"] = json.dumps(manifest).encode()
    registry.put("2", list(new.items()))
    assert "or replace an artifact with --force" in refusal(pull(registry, folder, version=":2"))
    (folder / "thesis.txt").write_text("years")
    assert "has thesis.txt" in refusal(pull(registry, folder, "--force", version=":2"))
    (folder / "thesis.txt").unlink()
    done = json.loads(pull(registry, folder, "--force", "--json", version=":2").stdout)
    assert (done["fetched"], done["new"]) == (len(new["chat_template.jinja"]), True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == new
    assert all(path.stat().st_nlink == 1 for path in folder.iterdir()) and not work(folder).exists()
    assert pull(registry, folder, "--force", version=":1").exit_code == 0
    assert hashes(folder) == hashes(cpu_artifact)


def test_a_damaged_folder_is_mended(
    registry: RegistryServer,
    pushed: str,
    cpu_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "a"
    assert pull(registry, folder).exit_code == 0
    with (folder / "model.onnx.data").open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    monkeypatch.setattr("qwen_common.manifest.HASHED_BYTES", 0)
    assert pull(registry, folder).exit_code == 0, "of its size"
    assert "mend it with --force" in refusal(pull(registry, folder, "--verify"))
    (folder / "vocab.json").unlink()
    assert "mend it with --force" in refusal(pull(registry, folder))
    done = json.loads(pull(registry, folder, "--force", "--verify", "--json").stdout)
    assert done["fetched"] == done["files"]["model.onnx.data"] + done["files"]["vocab.json"]
    assert hashes(folder) == hashes(cpu_artifact)


def test_a_file_that_was_taken_is_never_written_to(
    registry: RegistryServer, pushed: str, cpu_artifact: Path, tmp_path: Path
) -> None:
    """A pull that was stopped has a link to the older artifact's file, whose owner changes it then."""
    folder = tmp_path / "a"
    assert pull(registry, folder).exit_code == 0
    (folder / "genai_config.json").write_text("{}")
    staged = staging(folder, pushed)
    (folder / "vocab.json").write_text("mine")
    (staged / "vocab.json").hardlink_to(folder / "vocab.json")
    (tmp_path / "kept").hardlink_to(folder / "vocab.json")
    assert pull(registry, folder, "--force").exit_code == 0
    assert hashes(folder) == hashes(cpu_artifact) and (tmp_path / "kept").read_text() == "mine"


def test_a_file_system_without_links(
    registry: RegistryServer,
    pushed: str,
    cpu_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is the same is fetched again, and what came of it before is gone on with."""
    folder = tmp_path / "a"
    assert pull(registry, folder).exit_code == 0
    (folder / "genai_config.json").write_text("{}")
    data = (cpu_artifact / "model.onnx.data").read_bytes()
    (staging(folder, pushed) / "model.onnx.data").write_bytes(data[:1_000_000])
    (work(folder) / ".digest.partial").touch()  # a kill leaves it, now and then

    def refused(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "link", refused)
    done = json.loads(pull(registry, folder, "--force", "--json").stdout)
    sizes = done["files"]
    assert done["fetched"] == sum(sizes.values()) - sizes["manifest.json"] - 1_000_000
    assert hashes(folder) == hashes(cpu_artifact)


def test_the_older_one_stays_until_the_new_one_is_whole(
    registry: RegistryServer, layers: Layers, pushed: str, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    assert pull(registry, folder).exit_code == 0
    before = hashes(folder)
    registry.put("2", [*layers[:-1], (layers[-1][0], b"{}")])
    assert "do not agree" in refusal(pull(registry, folder, "--force", version=":2"))
    assert hashes(folder) == before


@pytest.mark.parametrize("redirects", [False, True])
@pytest.mark.parametrize("ranges", [False, True])
def test_answers_that_break_off(
    redirects: bool, ranges: bool, registry: RegistryServer, pushed: str, cpu_artifact: Path, tmp_path: Path
) -> None:
    registry.redirects, registry.ranges = redirects, ranges
    registry.cuts = 8 if ranges else 2
    registry.fails = [503, 429]
    assert pull(registry, tmp_path / "a").exit_code == 0
    assert hashes(tmp_path / "a") == hashes(cpu_artifact)
    assert registry.cuts == 0 and registry.fails == []


def test_an_interrupted_pull_goes_on(
    registry: RegistryServer, pushed: str, cpu_artifact: Path, tmp_path: Path
) -> None:
    registry.cuts = 12  # which is more than it is tried again
    registry.ranges = False
    assert "cannot be read" in refusal(pull(registry, tmp_path / "a"))
    assert not (tmp_path / "a").exists() and work(tmp_path / "a").is_dir()
    registry.cuts, registry.ranges = 0, True
    before = registry.bytes_out
    assert pull(registry, tmp_path / "a").exit_code == 0
    assert hashes(tmp_path / "a") == hashes(cpu_artifact)
    total = sum(path.stat().st_size for path in cpu_artifact.iterdir())
    assert registry.bytes_out - before < total and not work(tmp_path / "a").exists()


def test_what_was_left_there_may_be_wrong(
    registry: RegistryServer, pushed: str, cpu_artifact: Path, tmp_path: Path
) -> None:
    """Other beginnings, a whole file of other bytes, one too long, a link, a file of another tag."""
    staged = staging(tmp_path / "a", pushed)
    size = (cpu_artifact / "tokenizer.json").stat().st_size
    (staged / "model.onnx.data").write_bytes(b"\1" * 1000)
    (staged / "tokenizer.json").write_bytes(b"\1" * size)
    (staged / "vocab.json").write_bytes(b"\1" * 10 * size)
    (tmp_path / "mine").write_text("x")
    (staged / "merges.txt").symlink_to(tmp_path / "mine")
    (staged / "mtp.onnx").write_bytes(b"x")
    result = pull(registry, tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert hashes(tmp_path / "a") == hashes(cpu_artifact) and (tmp_path / "mine").read_text() == "x"


def test_beginnings_of_another_version_are_of_no_use(
    registry: RegistryServer, layers: Layers, pushed: str, cpu_artifact: Path, tmp_path: Path
) -> None:
    """They are not gone on with, for nothing; what is whole is."""
    staged = staging(tmp_path / "a", "sha256:" + "0a" * 32)
    (staged / "model.onnx.data").write_bytes(b"\1" * 1_000_000)
    (staged / "tokenizer.json").write_bytes(dict(layers)["tokenizer.json"])
    done = json.loads(pull(registry, tmp_path / "a", "--json").stdout)
    sizes = done["files"]
    assert done["fetched"] == sum(sizes.values()) - sizes["manifest.json"] - sizes["tokenizer.json"]
    assert hashes(tmp_path / "a") == hashes(cpu_artifact)


def test_a_hidden_folder_of_somebody_else(registry: RegistryServer, pushed: str, tmp_path: Path) -> None:
    hidden = work(tmp_path / "a")
    hidden.mkdir()
    (hidden / "thesis.txt").write_text("years")
    assert "has thesis.txt, which no pull made" in refusal(pull(registry, tmp_path / "a"))
    (hidden / "thesis.txt").rename(hidden / "pulled")
    assert "has pulled, which no pull made" in refusal(pull(registry, tmp_path / "a"))
    assert (hidden / "pulled").read_text() == "years"
    (tmp_path / ".b.partial").symlink_to(hidden)
    assert "is in the way" in refusal(pull(registry, tmp_path / "b"))


def test_two_at_once(registry: RegistryServer, pushed: str, tmp_path: Path) -> None:
    work(tmp_path / "a").mkdir()
    with FileLock(work(tmp_path / "a") / "lock"):
        assert "is being pulled by another qwen-run" in refusal(pull(registry, tmp_path / "a"))
    assert pull(registry, tmp_path / "a").exit_code == 0


def test_no_room(
    registry: RegistryServer, pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")(1_000_000)
    monkeypatch.setattr("qwen_runtime.registry.pull.shutil.disk_usage", lambda path: usage)
    assert "make room for it" in refusal(pull(registry, tmp_path / "a"))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("title", ["../x", "/tmp/x", "a/b", "a\\b", "nul", "MODEL.ONNX", "", None])
def test_layers_that_no_folder_gets(
    title: Any, registry: RegistryServer, layers: Layers, tmp_path: Path
) -> None:
    registry.put("1", [*layers, (title, b"x")])
    assert registry.repository in refusal(pull(registry, tmp_path / "a"))
    assert [path for path in tmp_path.iterdir() if path.name != "docker"] == []
    assert not [asked for asked in registry.asked if "/blobs/" in asked]


def test_layers_and_manifest_that_disagree(registry: RegistryServer, layers: Layers, tmp_path: Path) -> None:
    def said(*changed: tuple[str, bytes | None]) -> str:
        new = {**dict(layers), **dict(changed)}
        registry.put("1", [(name, data) for name, data in new.items() if data is not None])
        return refusal(pull(registry, tmp_path / "a"))

    assert "do not agree about notes.txt" in said(("notes.txt", b"x"))
    assert "do not agree about vocab.json" in said(("vocab.json", None))
    assert "do not agree about vocab.json" in said(("vocab.json", b"{}"))
    assert "has no manifest.json" in said(("manifest.json", None))
    assert "manifest.json is not valid JSON" in said(("manifest.json", b"{"))
    assert not (tmp_path / "a").exists()


def test_an_artifact_that_is_more_than_data(registry: RegistryServer, layers: Layers, tmp_path: Path) -> None:
    new = dict(layers)
    config = json.loads(new["genai_config.json"])
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = "evil.so"
    new["genai_config.json"] = json.dumps(config).encode()
    manifest = json.loads(new["manifest.json"])
    entry = {"size": len(new["genai_config.json"]), "sha256": digest_of(new["genai_config.json"])[7:]}
    manifest["files"]["genai_config.json"] = entry
    new["manifest.json"] = json.dumps(manifest).encode()
    registry.put("1", list(new.items()))
    assert "custom_ops_library" in refusal(pull(registry, tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_other_bytes_than_the_digest_says(
    registry: RegistryServer, layers: Layers, pushed: str, tmp_path: Path
) -> None:
    digest = digest_of(dict(layers)["vocab.json"])
    for data in (b"x" * len(registry.blobs[digest]), b"", registry.blobs[digest] + b"x"):
        registry.blobs[digest] = data
        assert f"sent something else for {digest}" in refusal(pull(registry, tmp_path / "a"))
    del registry.blobs[digest]
    assert f"has lost {digest}" in refusal(pull(registry, tmp_path / "a"))
    registry.manifests[pushed] = registry.manifests["1"] + b" "
    assert "sent something else" in refusal(pull(registry, tmp_path / "a", version=f"@{pushed}"))
    assert not (tmp_path / "a").exists()


def test_what_is_not_there(registry: RegistryServer, tmp_path: Path) -> None:
    assert f"{registry.repository}:1 is not there" in refusal(pull(registry, tmp_path / "a"))
    registry.put_manifest("1", b"x" * 5_000_000)
    assert "more than 4194304 bytes" in refusal(pull(registry, tmp_path / "a"))


@pytest.mark.parametrize(
    "status,why", [(400, "answers 400"), (403, "does not allow this login that"), (500, "cannot be read")]
)
def test_what_it_refuses(
    status: int, why: str, registry: RegistryServer, pushed: str, tmp_path: Path
) -> None:
    registry.fails = [status] * 10
    assert why in refusal(pull(registry, tmp_path / "a"))


def test_it_waits_as_long_as_it_is_told(
    registry: RegistryServer, pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("qwen_runtime.web.time.sleep", waited.append)
    registry.fails, registry.retry_after = [429], "7"
    result = pull(registry, tmp_path / "a")
    assert f"{registry.host} does not answer (Too Many Requests): asked again in 7 s" in result.stderr
    registry.fails, registry.retry_after = [429, 503], "999999"
    assert pull(registry, tmp_path / "b").exit_code == 0
    assert waited == [7, 60, 60]


def log_in(folder: Path, host: str, **entry: str) -> None:
    (folder / "docker").mkdir(exist_ok=True)
    (folder / "docker" / "config.json").write_text(json.dumps({"auths": {host: entry}}))


BASIC = base64.b64encode(b"me:secret").decode()


@pytest.mark.parametrize("how", ["basic", "token", "identity", "free"])
def test_a_login(how: str, registry: RegistryServer, pushed: str, cpu_artifact: Path, tmp_path: Path) -> None:
    registry.login, registry.redirects = "me:secret", True
    registry.basic, registry.identity, registry.pull_free = how == "basic", "refresh", how == "free"
    if how != "free":
        said = refusal(pull(registry, tmp_path / "a"))
        assert f"run docker login {registry.host}" in said
        log_in(tmp_path, registry.host, auth=base64.b64encode(b"me:wrong-one").decode())
        said = refusal(pull(registry, tmp_path / "a"))
        assert "login" in said and "wrong-one" not in said and "bWU6" not in said
        entry = {"identitytoken": "refresh"} if how == "identity" else {"auth": BASIC}
        log_in(tmp_path, registry.host, **entry)
    registry.lifetime = 3  # requests: then another token is asked for
    result = pull(registry, tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert hashes(tmp_path / "a") == hashes(cpu_artifact)
    assert registry.tokens > 2 or how == "basic"
    assert registry.shown and set(registry.shown) == {None}, "nothing is shown to another host"
    assert BASIC not in result.output and "secret" not in result.output


def test_tokens_that_are_none(
    registry: RegistryServer, pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.login, registry.pull_free = "me:secret", True
    for token in ("a\r\nX: y", None, "a b", "ü"):
        monkeypatch.setattr(
            "tests.support.registry_server.secrets.token_urlsafe", lambda _, token=token: token
        )
        said = refusal(pull(registry, tmp_path / "a"))
        assert "the token for" in said and "X: y" not in said


def test_no_plain_http_to_other_machines(registry: RegistryServer, tmp_path: Path) -> None:
    """A name of this machine that is no loopback address is spoken to by TLS, which this server has not."""
    name = f"oci://0.0.0.0:{registry.server_port}/team/tiny:1"
    said = refusal(CliRunner().invoke(main, ["pull", name, str(tmp_path / "a")]))
    assert "https://0.0.0.0" in said and "does not speak TLS" in said and registry.asked == []
    plain = ["pull", name, str(tmp_path / "a"), "--plain-http"]
    assert "is not there" in CliRunner().invoke(main, plain).stderr


def test_no_password_to_a_token_server_without_tls(
    registry: RegistryServer, pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.login = "me:secret"
    log_in(tmp_path, registry.host, auth=BASIC)
    for realm, why in [
        ("http://tokens.example/token", "http://tokens.example/token is no place for a password"),
        ("file:///etc/passwd", "names no server for its tokens"),
        ("http://127.0.0.1:1/token?service=x", "(http://127.0.0.1:1/token: [Errno"),
        ("http://[bad", "cannot be asked for"),
    ]:
        registry.realm = realm
        assert why in refusal(pull(registry, tmp_path / "a"))


def test_no_proxy_for_this_machine(
    registry: RegistryServer, pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert pull(registry, tmp_path / "a").exit_code == 0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_a_certificate_that_nobody_trusts(
    registry: RegistryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said at once; and the file that SSL_CERT_FILE names is trusted."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=here"]
    make += ["-addext", "subjectAltName=IP:0.0.0.0", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    registry.socket = context.wrap_socket(registry.socket, server_side=True)
    monkeypatch.setattr("qwen_runtime.web.time.sleep", lambda _: pytest.fail("it waits"))
    name = f"oci://0.0.0.0:{registry.server_port}/team/tiny:1"
    said = CliRunner().invoke(main, ["pull", name, str(tmp_path / "a")])
    assert said.exit_code == 2 and "not trusted (self-signed certificate)" in said.stderr
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert f"{name} is not there" in CliRunner().invoke(main, ["pull", name, str(tmp_path / "a")]).stderr
