"""Logins as Docker's and Podman's commands write them."""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from qwen_common.errors import UserError
from qwen_runtime.registry.credentials import find

ME = base64.b64encode(b"me:pa:ss").decode()
OTHER = base64.b64encode(b"other:word").decode()


def config(folder: Path, name: str = "config.json", **content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder / name


@pytest.mark.parametrize(
    "auths,repository",
    [
        ({"registry.example": {"auth": ME}}, "registry.example/team/a"),
        ({"https://registry.example": {"auth": ME}}, "registry.example/a"),
        ({"https://registry.example/v1/": {"auth": ME}}, "registry.example/a"),
        (
            {"registry.example:5000": {"auth": ME}, "registry.example": {"auth": OTHER}},
            "registry.example:5000/a",
        ),
        ({"registry.example": {"username": "me", "password": "pa:ss"}}, "registry.example/a"),
        (
            {"registry.example": {"auth": OTHER}, "registry.example/team": {"auth": ME}},
            "registry.example/team/a",
        ),
        ({"https://index.docker.io/v1/": {"auth": ME}}, "docker.io/team/a"),
    ],
)
def test_an_entry(auths: dict[str, Any], repository: str, tmp_path: Path) -> None:
    config(tmp_path / "docker", auths=auths)
    found = find(repository)
    assert found is not None and found.basic == ME
    assert ME not in repr(found) and "pa:ss" not in repr(found)


def test_tokens(tmp_path: Path) -> None:
    config(
        tmp_path / "docker", auths={"a.example": {"identitytoken": "i"}, "b.example": {"registrytoken": "r"}}
    )
    a, b = find("a.example/x"), find("b.example/x")
    assert a is not None and a.identity == "i" and b is not None and b.bearer == "r"


def test_nobody(tmp_path: Path) -> None:
    assert find("registry.example/a") is None
    config(tmp_path / "docker", auths={"registry.example": {}, "other.example": {"auth": ME}})
    assert find("registry.example/a") is None


def test_which_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config(tmp_path / "docker", auths={"registry.example": {"auth": OTHER}})
    config(tmp_path / "run" / "containers", "auth.json", auths={"registry.example": {"auth": ME}})
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    found = find("registry.example/a")
    assert found is not None and found.basic == ME
    empty = config(tmp_path, "mine.json")
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(empty))
    assert find("registry.example/a") is None
    empty.unlink()
    with pytest.raises(UserError, match=r"REGISTRY_AUTH_FILE names .*mine.json, which is no file"):
        find("registry.example/a")


@pytest.mark.parametrize("content", ["no JSON", "[]", '{"auths": {"registry.example": {"auth": "s3cret!"}}}'])
def test_files_that_are_none(content: str, tmp_path: Path) -> None:
    (config(tmp_path / "docker")).write_text(content)
    with pytest.raises(UserError, match=r"config\.json .*log in") as caught:
        find("registry.example/a")
    assert "s3cret" not in str(caught.value)


HELPER = """#!{python}
import json, sys
server = sys.stdin.read()
open({asked!r}, "a").write(f"{{sys.argv[1]}} {{server}}\\n")
{end}
"""
ANSWERS = 'print(json.dumps({"ServerURL": server, "Username": "%s", "Secret": "pa:ss"}))'


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if sys.platform == "win32":
        pytest.skip("the helper is a script")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "bin" / "docker-credential-mine"


def install(helper: Path, end: str) -> Path:
    asked = helper.parents[1] / "asked"
    helper.write_text(HELPER.format(python=sys.executable, asked=str(asked), end=end))
    helper.chmod(0o755)
    return asked


@pytest.mark.parametrize("which", [{"credsStore": "mine"}, {"credHelpers": {"registry.example": "mine"}}])
def test_a_helper(which: dict[str, Any], helper: Path, tmp_path: Path) -> None:
    asked = install(helper, ANSWERS % "me")
    config(tmp_path / "docker", auths={"registry.example": {}}, **which)
    found = find("registry.example/team/a")
    assert found is not None and found.basic == ME
    assert asked.read_text() == "get registry.example\n"


def test_a_helper_with_an_identity_token(helper: Path, tmp_path: Path) -> None:
    asked = install(helper, ANSWERS % "<token>")
    config(tmp_path / "docker", credsStore="mine")
    found = find("docker.io/team/a")
    assert found is not None and (found.identity, found.basic) == ("pa:ss", "")
    assert asked.read_text() == "get https://index.docker.io/v1/\n"


def test_a_helper_that_knows_nobody(helper: Path, tmp_path: Path) -> None:
    install(helper, 'sys.exit("credentials not found in native keychain")')
    config(tmp_path / "docker", credsStore="mine")
    assert find("registry.example/a") is None


@pytest.mark.parametrize("end", ['sys.exit("broken pa:ss")', 'print("pa:ss")', "print('{}')", "print('[1]')"])
def test_a_helper_that_fails(end: str, helper: Path, tmp_path: Path) -> None:
    install(helper, end)
    config(tmp_path / "docker", credsStore="mine")
    with pytest.raises(UserError, match="docker-credential-mine") as caught:
        find("registry.example/a")
    assert "pa:ss" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent", "../mine", "/bin/sh", "mine --help", "mine\nx"])
def test_a_helper_that_is_not_there(name: str, helper: Path, tmp_path: Path) -> None:
    asked = install(helper, ANSWERS % "me")
    config(tmp_path / "docker", credsStore=name)
    with pytest.raises(UserError, match="which is not installed") as caught:
        find("registry.example/a")
    assert "\n" not in str(caught.value) and not asked.exists()
