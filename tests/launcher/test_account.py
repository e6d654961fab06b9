"""start.sh by root's hand, in a folder whose `state` and `logs` are the service's."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from qwen_runtime.kiosk.install import Installation

from tests.support.small_kiosk import FACTS, new_key, small_bundle, started, wait_for

SERVICE = 65534  # nobody

# The program by which start.sh calls this Python, where others than root may read it.
PYTHON = shutil.which(f"python{FACTS['python']}", path="/usr/local/bin:/usr/bin")

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0, reason="root and another user, of Linux"
    ),
    pytest.mark.skipif(PYTHON is None, reason="this Python is root's alone"),
]
PATH = f"{Path(PYTHON or '').parent}:{os.environ['PATH']}"


@pytest.fixture
def kiosk(tmp_path: Path) -> Iterator[Path]:
    """Where others may look into, as nobody does into pytest's folders."""
    key = new_key(tmp_path)
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        target = Path(name, "kiosk")
        bundle = small_bundle(tmp_path / "bundle", key, "1.0")
        Installation(target).install(bundle, key.with_suffix(".pub"), lambda _: None)
        for folder in ("state", "logs"):
            (target / folder).mkdir(exist_ok=True)
            for path in (target / folder, *(target / folder).iterdir()):
                os.chown(path, SERVICE, SERVICE)
        yield target


def users_of(process: int) -> set[str]:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("Uid:"):
            return set(line.split()[1:])
    raise AssertionError(process)


def test_root_writes_through_no_link_of_the_service(kiosk: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (kiosk / "logs" / "kiosk.log").symlink_to(secret)
    with started(kiosk, PATH=PATH) as (process, port):
        assert wait_for(port).startswith("1.0")
        server = json.loads((kiosk / "state" / "running.json").read_text())["server"]
        assert users_of(process.pid) == users_of(server) == {str(SERVICE)}
        assert (kiosk / "state" / "compiled").stat().st_uid == SERVICE
    assert secret.read_text() == "secret"


def test_the_service_goes_on_after_root(kiosk: Path) -> None:
    """What the one wrote the other can write: notes and log."""
    with started(kiosk, PATH=PATH) as (_, port):
        wait_for(port)
    assert (kiosk / "logs" / "kiosk.log").stat().st_uid == SERVICE
    assert {path.stat().st_uid for path in (kiosk / "state").iterdir()} == {SERVICE}


def test_a_kiosk_of_root_alone_is_served_by_root(kiosk: Path) -> None:
    """As in a container, where install.sh makes no user."""
    for folder in ("state", "logs"):
        shutil.rmtree(kiosk / folder)
    with started(kiosk, PATH=PATH) as (process, port):
        assert wait_for(port).startswith("1.0")
        assert users_of(process.pid) == {"0"}
