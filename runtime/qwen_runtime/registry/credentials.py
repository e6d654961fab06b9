"""Who one is at a registry, as `docker login`, `podman login` and `oras login` have written it down."""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_common.errors import UserError, one_line
from qwen_common.files import read_json

_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PATIENCE = 60.0  # seconds for a helper, which may ask its user
_NO_NAME = "<token>"  # a helper's user name where the secret is an identity token
# Under which other name Docker keeps its own registry.
_KNOWN_AS = {"docker.io": "https://index.docker.io/v1/"}


@dataclass(frozen=True)
class Credentials:
    """What a registry or its token server takes; one of the three ways.

    Attributes:
        basic: user and password as HTTP's Basic has them.
        identity: a token that is exchanged for others (OAuth2's refresh token).
        bearer: a token that the registry takes as it is.
        source: where they were found.
    """

    source: str
    basic: str = field(default="", repr=False)
    identity: str = field(default="", repr=False)
    bearer: str = field(default="", repr=False)


def find(repository: str) -> Credentials | None:
    """Those for `registry.example/team/model`; None: nobody logged in there.

    `REGISTRY_AUTH_FILE` alone where it is set, else Podman's file and Docker's (`DOCKER_CONFIG`). The most
    precise of their entries counts: a helper's (`credHelpers`), the file's own, `credsStore`.

    Raises:
        UserError: a file that is none, or a helper that is missing or fails.
    """
    for path in _files():
        if not path.is_file():
            continue
        config = read_json(path, "log in to the registry again")
        if found := _in_file(config, repository, path):
            return found
    return None


def _files() -> Iterator[Path]:
    if chosen := os.environ.get("REGISTRY_AUTH_FILE"):
        if not Path(chosen).is_file():
            raise UserError(f"REGISTRY_AUTH_FILE names {chosen}, which is no file: log in, or unset it")
        yield Path(chosen)
        return
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        yield Path(runtime) / "containers" / "auth.json"
    folder = os.environ.get("DOCKER_CONFIG")
    yield Path(folder or os.path.expanduser("~/.docker")) / "config.json"


def _in_file(config: Mapping[str, Any], repository: str, path: Path) -> Credentials | None:
    host = repository.partition("/")[0]
    server = _KNOWN_AS.get(host, host)
    helpers, auths = config.get("credHelpers"), config.get("auths")
    helper = helpers.get(host) if isinstance(helpers, dict) else None
    if isinstance(helper, str) and helper:
        return _from_helper(helper, server, path)
    entries = auths if isinstance(auths, dict) else {}
    for key in _keys(repository, server):
        entry = entries.get(key) or entries.get(f"https://{key}") or entries.get(f"https://{key}/")
        if isinstance(entry, dict) and (found := _from_entry(entry, path)):
            return found
    store = config.get("credsStore")
    return _from_helper(store, server, path) if isinstance(store, str) and store else None


def _keys(repository: str, server: str) -> Iterator[str]:
    """Under which an entry may stand: Podman's may be for a part of a registry only."""
    parts = repository.split("/")
    for count in range(len(parts), 0, -1):
        yield "/".join(parts[:count])
    yield server
    yield f"{parts[0]}/v1/"
    yield f"{parts[0]}/v2/"


def _from_entry(entry: Mapping[str, Any], path: Path) -> Credentials | None:
    def text(name: str) -> str:
        value = entry.get(name, "")
        return value if isinstance(value, str) else ""

    basic = text("auth")
    if not basic and text("username"):
        basic = _basic(text("username"), text("password"))
    if basic:
        try:
            base64.b64decode(basic, validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserError(f"{path} has an 'auth' that is no base64: log in again") from error
    if not (basic or text("identitytoken") or text("registrytoken")):
        return None
    return Credentials(str(path), basic, text("identitytoken"), text("registrytoken"))


def _from_helper(helper: str, server: str, path: Path) -> Credentials | None:
    """Ask `docker-credential-HELPER`, a program of the user's, as Docker's own tools do."""
    program = shutil.which(f"docker-credential-{helper}") if _HELPER.fullmatch(helper) else None
    # Windows also looks into the current folder, where anybody's program may lie.
    if program is None or not os.path.isabs(program):
        raise UserError(
            f"{path} wants docker-credential-{one_line(helper[:50])}, which is not installed: install it, or "
            "set REGISTRY_AUTH_FILE to a file with the credentials"
        )
    try:
        done = subprocess.run(
            [program, "get"], input=server.encode(), capture_output=True, timeout=_PATIENCE, check=False
        )
        if done.returncode != 0:
            if b"credentials not found" in done.stdout + done.stderr:
                return None
            raise UserError(f"{program} gives no credentials for {server}: log in again")
        found = json.loads(done.stdout)
        name, secret = found["Username"], found["Secret"]
    except (OSError, ValueError, KeyError, TypeError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{program} does not answer as such a program should: see to it") from error
    if name == _NO_NAME:
        return Credentials(program, identity=str(secret))
    return Credentials(program, _basic(str(name), str(secret)))


def _basic(name: str, secret: str) -> str:
    return base64.b64encode(f"{name}:{secret}".encode()).decode()
