"""A store of bundles that devices update from: `qwen_runtime.kiosk.sources` says what is where in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from qwen_common.errors import UserError
from qwen_common.files import as_json, partial, read_json, replace, sha256
from qwen_launcher.bundle import CONTENTS, SIGNATURE, Bundle
from qwen_runtime.kiosk.sources import RINGS, object_path

_LOCK = ".publish.lock"


@dataclass(frozen=True)
class Published:
    """What was put into a store.

    Attributes:
        new: bytes that it did not have.
        rings: version of each ring.
    """

    version: str
    new: int
    rings: dict[str, str]


def publish(
    folder: Path, store: Path, public_key: Path, rings: Sequence[str], note: Callable[[str], None]
) -> Published:
    """Copy an unpacked bundle into a store, and give it to rings of devices as the last step.

    Devices that are updating meanwhile get the version that they began with.

    Args:
        rings: those that take it; without any, it is there and none takes it.

    Raises:
        UserError: the bundle is not as it was signed, another one of its version is in the store, or another
            publish is changing the store.
    """
    bundle = Bundle.open(folder, public_key)
    note("checking every file")
    bundle.check()
    store.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(store / _LOCK, timeout=0):
            return _put(bundle, store, rings, note)
    except Timeout as error:
        raise UserError(f"another publish is changing {store}: wait for it to end") from error


def _put(bundle: Bundle, store: Path, rings: Sequence[str], note: Callable[[str], None]) -> Published:
    version = bundle.contents["version"]
    listed = store / "versions" / version
    if (listed / CONTENTS).exists() and (listed / CONTENTS).read_bytes() != bundle.signed[0]:
        raise UserError(f"{store} has another version {version}: give the bundle a version of its own")
    note("copying what is new")
    new = 0
    for name, entry in bundle.contents["files"].items():
        target = store / object_path(name, entry)
        if target.exists() and target.stat().st_size == entry["size"] and sha256(target) == entry["sha256"]:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.root / name, partial(target))
        os.replace(partial(target), target)
        new += entry["size"]
    listed.mkdir(parents=True, exist_ok=True)
    for name, data in zip((CONTENTS, SIGNATURE), bundle.signed, strict=True):
        replace(listed / name, data)
    path = store / RINGS
    taken = read_json(path, "remove it and publish again") if path.exists() else {}
    taken |= dict.fromkeys(rings, version)
    replace(path, as_json(taken))
    return Published(version, new, taken)
