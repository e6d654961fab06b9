"""Where finished artifacts go: whatever `qwen-export push` takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qwen_export import push as hub
from qwen_export import registry_push as registry

REGISTRY = "oci://"


def check_target(target: str) -> None:
    """Raises:
    UserError: it is neither `org/name` nor `oci://HOST/NAME:TAG`.
    """
    if target.startswith(REGISTRY):
        registry.destination(target)
    else:
        hub.check_name(target)


def send(artifact: Path, target: str, public: bool, plain_http: bool, note: Callable[[str], None]) -> str:
    """Send what is not there yet; returns the commit, or the digest.

    Raises:
        UserError: as `push.plan` and `push.push`, or those of `registry_push`.
    """
    if target.startswith(REGISTRY):
        planned = registry.plan(artifact, target, plain_http, note)
        registry.push(artifact, planned, note)
        return planned.digest
    return hub.push(artifact, hub.plan(artifact, target), public)
